"""Words, tables and figures of a study.

`judgement` collects the verdicts, `prose` and `forecast_prose` put them into sentences, `terminal`, `page`, `tables`
and `latex` show them as text, HTML, CSV and LaTeX, and `studies` compares two studies. `templates/` holds the page's
HTML, CSS and JavaScript; `figures/` draws its figures and alone imports matplotlib.
"""
