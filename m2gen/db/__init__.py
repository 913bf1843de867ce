"""The tuning database: measured, verified schedules as lines of JSON that can be read, merged and shared."""
