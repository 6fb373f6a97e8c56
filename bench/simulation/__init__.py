"""The scheduler and the admission of the server under a virtual clock: hours of load in seconds."""
