"""Search the shapes at a goal: cut several after one scoring, retrain them by successive halving, and rank the rest."""
