"""Search for schedules: the declared space, candidates in isolated workers, trials, and records of winners."""
