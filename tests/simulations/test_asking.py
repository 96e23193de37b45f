"""What is lost by asking a few, from lines as the study keeps them."""

from simulations.asking import table


def line(others, seed, accuracy, seconds):
    return {"others": others, "seed": seed, "accuracy": accuracy, "distillation_seconds": seconds}


def test_the_loss_is_that_of_the_same_seeds():
    lines = [line("all", 0, 0.95, 100), line("all", 1, 0.90, 110), line(7, 0, 0.945, 60), line(3, 0, 0.93, 40)]
    (found,) = table([*lines, line(3, 1, 0.91, 50), line(3, 2, 0.5, 45)])
    assert found.rows[1:] == [
        ["all", "92.5", "95.0, 90.0", "", "105"],
        ["3", "78.0", "93.0, 91.0, 50.0", "0.5", "45"],
        ["7", "94.5", "94.5", "0.5", "60"],
    ]
