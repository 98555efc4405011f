"""What the language model examples share: text, batches, flags, reports. None of it knows a framework."""
