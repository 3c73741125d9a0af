"""What an attention, a student, a whole UNet costs: operations counted, times measured. Knows no pipeline."""
