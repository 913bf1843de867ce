"""The tuning database: measured, verified schedules as lines of JSON that can be read, merged and shared."""

from m2gen.db.database import Change, Database, merged
from m2gen.db.exchange import export_text, read_export, read_other, write_export
from m2gen.db.fields import (
    LASTING,
    POLICY,
    Clocks,
    Environment,
    Estimate,
    Failure,
    Key,
    Provenance,
    Reason,
    Sizes,
    Status,
    TensorError,
    Throttled,
    ThrottleReason,
    Timing,
)
from m2gen.db.files import Contents, Fault, slug
from m2gen.db.lookup import Query, Served, Tier, look_up, usual_device
from m2gen.db.rank import failures, flag, slot, stale, verdict
from m2gen.db.record import SCHEMA, NotARecord, Record, decode, encode, message_of

__all__ = [
    "LASTING",
    "POLICY",
    "SCHEMA",
    "Change",
    "Clocks",
    "Contents",
    "Database",
    "Environment",
    "Estimate",
    "Failure",
    "Fault",
    "Key",
    "NotARecord",
    "Provenance",
    "Query",
    "Reason",
    "Record",
    "Served",
    "Sizes",
    "Status",
    "TensorError",
    "ThrottleReason",
    "Throttled",
    "Tier",
    "Timing",
    "decode",
    "encode",
    "export_text",
    "failures",
    "flag",
    "look_up",
    "merged",
    "message_of",
    "read_export",
    "read_other",
    "slot",
    "slug",
    "stale",
    "usual_device",
    "verdict",
    "write_export",
]
