"""What a study's evidence amounts to, and how it is told: one data model, rendered as tables, figures and a report."""
