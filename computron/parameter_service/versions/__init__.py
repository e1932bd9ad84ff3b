"""Files that several processes write together: snapshots to resume from, and published versions."""
