from support import check_pass

from qat2int8.passes.cleanup import Cleanup


def test_what_nobody_reads_goes_and_equal_constants_become_one() -> None:
    _, result = check_pass(
        Cleanup(),
        """
        g (float[2] x, float[2] unread) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {3, 4}> {
          [dead] d = Neg (x)
          [add] e = Add (x, a)
          [mul] y = Mul (e, b)
        }
        """,
        """
        g (float[2] x, float[2] unread) => (float[2] y) <float[2] a = {1, 2}>
          { [add] e = Add (x, a) [mul] y = Mul (e, a) }
        """,
    )
    assert {k: v for k, v in result.counts.items() if v} == {
        "initializers shared": 1,
        "nodes removed": 1,
        "initializers removed": 1,
    }
