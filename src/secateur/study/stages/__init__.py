"""The work of each kind of stage: read the folders of the inputs, write a folder, return a record."""
