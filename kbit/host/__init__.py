"""What is around the program: errors, files, folders, processors, this process."""
