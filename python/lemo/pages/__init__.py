"""Self-contained HTML pages: one file, nothing loaded from elsewhere. Imports no other part of lemo."""
