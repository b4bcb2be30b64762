"""What was measured: records, their comparison, tables, figures, and the pages made of them."""
