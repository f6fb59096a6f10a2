"""Teacher and student in a few lines of Python, on a generated corpus.

    python examples/train_in_python.py [folder]

Writes the corpus to the folder (default: corpus), trains a plain student, a teacher that starts from it and a student
of that teacher, and prints their test R@1. For a table with the controls that such a comparison needs: `lcr2s demo`.
"""

import sys

from lcr2s_ext.data import generate_corpus
from lcr2s_ext.training import (
    evaluate_student,
    evaluate_teacher,
    fit_student,
    fit_teacher,
    load_config,
    prepare_data,
)


def main(root: str) -> None:
    generate_corpus(root, identities=(100, 30, 50))
    config = load_config(None, [f"data.root={root}", "epochs=10", "eval_every=10"])
    data = prepare_data(config)

    plain = fit_student(config, data, name="plain")
    teacher = fit_teacher(config, data, init=plain.model.student)
    student = fit_student(config, data, teacher=teacher.model)

    for name, result in (
        ("plain student", evaluate_student(plain.model, data, "test")),
        (
            "teacher, support sets drawn by identity (oracle)",
            evaluate_teacher(teacher.model, data, "test", max_support=4),
        ),
        ("student of the teacher", evaluate_student(student.model, data, "test")),
    ):
        print(f"{name}: R@1 {100 * result['text_to_image']['R@1']:.1f} %")

    student.model.save_pretrained(f"{root}/student")
    feature = student.model.encode_text("a man in a red coat with a black bag")
    print("one sentence, one unit vector:", tuple(feature.shape))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "corpus")
