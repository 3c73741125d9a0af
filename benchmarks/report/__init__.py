"""What is made of the tables: plots, and the tables of the documents."""
