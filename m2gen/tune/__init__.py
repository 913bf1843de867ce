"""The search for schedules: the declared space, candidates in isolated workers, trials, and the records of winners."""
