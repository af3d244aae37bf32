"""What we write as YAML is read alike by either version of it."""

import yaml

from rmoe_megablocks import yaml12

LOOKS_LIKE_SOMETHING_ELSE = [
    "010",
    "1e-4",
    "2.0e-3",
    "1:30",
    "no",
    "on",
    "true",
    "null",
    "~",
    "",
    "0o10",
    "0x1F",
    "1_000",
    ".inf",
    "<<",
    "=",
] + ["2024-01-01", "-5", "+5", "12e4567", "a: b", "# a", "--x", "([0]*3+[1]*45)", "${A:-b}", "\u00e9", "a\nb", " a "]


def test_text_stays_text_and_numbers_stay_numbers():
    content = {"MODEL_ARGS": {f"--{i}": text for i, text in enumerate(LOOKS_LIKE_SOMETHING_ELSE)}}
    content["MODEL_ARGS"] |= {"--f": 1e-5, "--i": 4, "--l": [1, 0.3, "0.3"], "--t": True, "--b": 1.5e300}
    text = yaml12.write(content)
    for read in (yaml12.parse(text).content, yaml.safe_load(text)):
        assert read == content
        for name, value in content["MODEL_ARGS"].items():
            assert isinstance(read["MODEL_ARGS"][name], type(value)), name
    assert "--f: 1.0e-05\n" in text and "--i: 4\n" in text and "--1: '1e-4'\n" in text


def test_lines_of_the_keys():
    document = yaml12.parse("# c\nA:\n  x: 1\n\n  y: {z: 2}\nB: 3\n")
    assert document.lines == {("A",): 2, ("A", "x"): 3, ("A", "y"): 5, ("B",): 6}
