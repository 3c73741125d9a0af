"""Students in place of self-attentions: the student, the swap, the teacher, their files. Knows no pipeline."""
