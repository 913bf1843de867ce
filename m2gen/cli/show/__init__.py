"""The output of commands: tables, JSON and JUnit documents, figures, and the page about searches."""
