"""Who applies the update, and how."""
