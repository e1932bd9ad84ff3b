"""Results for people: tables, pictures, a timeline to look around in. The only place that needs rich or matplotlib."""
