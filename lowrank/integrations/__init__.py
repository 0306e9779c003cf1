"""lowrank inside other libraries.  Each module imports its library when it is itself imported, never before."""
