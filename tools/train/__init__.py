"""What tools/train_family.py is made of: shapes, corpus, model, training run."""
