"""A package of kernels: the text of its files, the folder that holds them, wheels and repositories of the Hub."""
