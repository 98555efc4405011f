"""The world, transports, launch tuning and health: the only room that moves bytes between ranks."""
