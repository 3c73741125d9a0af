"""A pipeline from what lies on disk: folders, single files, VAEs. Knows nothing of students."""
