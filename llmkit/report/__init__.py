"""What people see of a run: its folder, tables, pictures, traces and progress. Torch-free, and matplotlib is lazy."""
