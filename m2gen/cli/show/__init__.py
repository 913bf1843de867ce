"""What commands print: tables, JSON and JUnit documents, figures, and the page about searches."""
