"""How close a student is to its teacher: measurements, the report, the model card."""
