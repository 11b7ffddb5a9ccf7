"""Reading PyTorch's files without PyTorch: two files that torch 2.13 wrote, and many damaged or malicious ones."""

import base64
import os
import pickle
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop.weights import read_weights

# base = torch.arange(6, dtype=torch.float32).reshape(2, 3); torch.save({"epoch": 3, "state_dict": {"plain": base,
# "transposed": base.T, "bfloat16": base.bfloat16(), "parameter": torch.nn.Parameter(base + 1)}}, ...), zlib, base 85;
# LEGACY with _use_new_zipfile_serialization=False.
ZIP = (
    "c-p0wPfrs;7{;evy1<J3Q{<0`q9}`CX-k0?gESkn9`+#Am^5CRr5)(TrQ3Hq#b`n#F{0eWgC}GB4jw#s(U0KWL=$6-C%=L-JFx6-Eg()hopd|T"
    "^Za)D&TJPop$Vau7F5?dQ8&`<LdjUilSQ5A(aL>ORoc-#U)v0C0FrYO6;z2%aK3012!u8uEaxKhV#U;rG6)4?QLAXaMhvqm<!!uNGt6S1;BwWn"
    "^Xmx-nq)cG?6_FAzKS8jC6a1dI=RCyN+9M!bWRMKa{?U;l^V2YB7xQ=4QXLb*aArtw9pou*e(<-)5Ha0Smmm8+b&`o7jIHF3EIZ8aFRfK7CIbm"
    "V(aB<#j4^Wbe1SaDN+(k%_YaUix~@Acni9<5c5B^U1Ivv1bVV?Cdbxod4(ayXP}p>cfl2vUv}C19QHW$bL#<@`7CE1<ksg13}xYbu9dBxZtH89"
    "U>hzpSV4D&1jBpqPEG<Y@|;U<&Ir%B%yX^~7|nwG-1#u}46bHjyypC7xMCGbFrf*x=%Uu#GQYHx{7NlZUu;+|y=c%am*|RRujwSej_oR4e^u!V"
    "RLy>ivxN7*zdT{gtT#>=K(qS^yJeEsO=GpZhRZ}%rW%GE&}NbhVBrD$3e$-2fdE}-!39`;NU+7KN>#2OCwH%z1|cS93{U63_lq<|JdmLs-SF+o"
    "$(X9l{RaSd-CUq=8Tz7qllHe6M%4S_=T0B}qVEu*2|rO>Rb+JZe43rfWHvKA^WE^bxi;$Bc1UK*pP5jVBs$*x*WWurA03vFAL;(X@4o|$yDV<O"
    "j~*3fN@7W$->lv}y#9tzVt)fTw_U}yL3h9-ogH&|qo^v;e_VxFDw$5EQmN!@dS*J7OwCSB$70FE^i+B#5vL!g)9Ki3DwbxHJ<_KSGUbpR$`FHf"
    "IlYHOXB~O)ITBQR4}e~uax#n>9V<Z-?<OAbne2E?>Q0WJk9Q+>`Fy$sRDS>j<=$P>?vuX~P+;!{wchIYYvrbZHXhV^tJSZ49n>a*T5tVz_;VvD"
    "SlvOfw=9Ny;+G!r-wSq86UB+W@)oYS%GSVmE6m4~$VaMUe-_Z=T?YQ-h=^R%>dfbJ{{UZE@{a"
)
LEGACY = (
    "c-nQ6%Wl*#6o#E-E^VNt+$q<V>y*oAE}f}nMTF37EN<z>8x*C9X@WwWV>^{V8Y!!x<r!G8<S}?19s!93&UiXhB1CZ{pW}1B^Z#*SezB9^U&p^T"
    "-hY3+-Y(1+KP~m00BVsngiywrWC2UO1Ik6rQZUp3vZ69cEM-DHnuf8Tf_X@66_g({>WTOh6<|%E)*^Kk6cOVR>ewWf+Qq4a2Ck7>*@LC~(8RSo"
    "KW3Iqg!Co#!Z?s%Ou*Dlvc!*5umZ_=5VgHr#)+^!PWSRS2|Y<u!MJzOvlX;OnzJs9`}-8?y2KtQ%$K`5XhVansxzbQet)Mw>W=!uPIm~+*?>Wo"
    "!xC=1l(75;BWz-83O2T|F@;k{f$}1ufmBuq`xOr<r{QxosST&MTv(B?>cSaq1@}{tF+oFEi_}n2J*tGBjWq0B3A3;{h4a`bnHP?tvgbt!mt43^"
    "mQ?B9yHbQIx}rPIr9B(#@Iu}C2~cOy+wKgyJ-9jtU0bNSu2tR8pqmnIxv)W&OSgUQf1r|b*!+*<ixW27u9i3Gba#euXHLDlpx)Ee`<nVdLd%7%"
    "!`bHHXL#ho<9znVX~u#Go?xrI9B<3ZQ6b8xvec{^#G>s6I(~|$$Z?#)`R4qM&Ep6;>Q$>y>tz1l96~>wKLi2RYy"
)
BASE = np.arange(6, dtype=np.float32).reshape(2, 3)


def unpack(blob):
    return zlib.decompress(base64.b85decode(blob))


@pytest.mark.parametrize("blob", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_files_by_torch(blob, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(unpack(blob))
    got = read_weights(path)
    assert list(got) == ["plain", "transposed", "bfloat16", "parameter"]
    for name, want in {"plain": BASE, "transposed": BASE.T, "bfloat16": BASE, "parameter": BASE + 1}.items():
        np.testing.assert_array_equal(got[name], want)
        assert got[name].dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
        assert got[name].flags.owndata and got[name].flags.writeable


@pytest.mark.parametrize("blob", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_every_truncation_is_an_error_of_one_line(blob, tmp_path):
    data = unpack(blob)
    path = tmp_path / "cut.pth"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            read_weights(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def save(path, data, **entries):
    """A zip as torch writes it, around the given data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data)
        for name, content in entries.items():
            archive.writestr(f"weights/{name.replace('__', '/')}", content)
    return path


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir])
def test_a_malicious_pickle_does_not_run(function, zipped, tmp_path):
    witness = tmp_path / "witness"
    argument = {os.system: f"touch {witness}", eval: f"open({str(witness)!r}, 'w')", os.mkdir: str(witness)}[function]
    data = pickle.dumps({"weights": Call(function, argument)})
    path = tmp_path / "bad.pth"
    if zipped:
        save(path, data)
    else:
        path.write_bytes(data)
    with pytest.raises(InputError, match="its pickle uses"):
        read_weights(path)
    assert not witness.exists()


def tensor_pickle(kind="storage", storage="FloatStorage", numel=6, offset=0, size=(2, 3), stride=(3, 1)):
    """The pickle of {"w": tensor}, in protocol 0 text so that one can read it."""
    ints = {name: "(" + "".join(f"I{n}\n" for n in value) + "t" for name, value in (("size", size), ("stride", stride))}
    reference = f"(V{kind}\nctorch\n{storage}\nV0\nVcpu\nI{numel}\ntQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({reference}I{offset}\n{ints['size']}{ints['stride']}I00\nNtR"
    return f"(dVw\n{tensor}s.".encode()


def test_a_tensor_written_by_hand(tmp_path):
    path = save(tmp_path / "w.pt", tensor_pickle(offset=1, size=(2, 2)), data__0=BASE.tobytes(), byteorder=b"little")
    np.testing.assert_array_equal(read_weights(path)["w"], [[1, 2], [4, 5]])


def fp8_pickle(dtype, num_bytes=6):
    """The pickle of {"w": fp8 tensor [2, 3]}: its storage is untyped, and the type an argument of the rebuild."""
    reference = f"(Vstorage\nctorch.storage\nUntypedStorage\nV0\nVcpu\nI{num_bytes}\ntQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v3\n({reference}I0\n(I2\nI3\nt(I3\nI1\ntI00\nNctorch\n{dtype}\ntR"
    return f"(dVw\n{tensor}s.".encode()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8(dtype, tmp_path):
    values = BASE.astype(getattr(ml_dtypes, dtype))
    path = save(tmp_path / "w.pt", fp8_pickle(dtype), data__0=values.tobytes())
    got = read_weights(path)["w"]
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got.astype(np.float32), BASE)


def test_fp8_that_does_not_fit_its_storage(tmp_path):
    path = save(tmp_path / "w.pt", fp8_pickle("float8_e5m2", num_bytes=5), data__0=bytes(5))
    with pytest.raises(InputError, match="beyond its storage of 5"):
        read_weights(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (2, 4)}, "beyond its storage of 6"),
        ({"offset": 1}, "beyond its storage of 6"),
        ({"size": (10**9, 3), "stride": (0, 1)}, "beyond its storage of 6"),
        ({"offset": -1}, "stride"),
        ({"stride": (-3, 1)}, "stride"),
        ({"stride": (1,)}, "stride"),
        ({"storage": "QInt8Storage"}, "torch.QInt8Storage"),
        ({"kind": "module"}, "unknown reference 'module'"),
        ({"numel": 7}, "damaged: storage 0 has 24 bytes, not 7 elements"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(changes, words, tmp_path):
    path = save(tmp_path / "w.pt", tensor_pickle(**changes), data__0=BASE.tobytes())
    with pytest.raises(InputError, match=words):
        read_weights(path)


def test_foreign_files_are_refused(tmp_path):
    cases = {
        "absent.pth": (None, "there is no file"),
        "text.pth": (b"hello", "not readable"),
        "number.pth": (pickle.dumps(1) * 3, "not a PyTorch file"),
        "text.safetensors": (b"hello", "damaged: it ends within its header"),
    }
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_weights(tmp_path / name)
    for name, data, entries, words in (
        ("list", pickle.dumps([1]), {}, "no dict of tensors"),
        ("numbers", pickle.dumps({"a": 1}), {}, "no dict of tensors"),
        ("storage", tensor_pickle(), {}, "cannot read storage 0"),
        ("big", tensor_pickle(), {"byteorder": b"big"}, "big-endian"),
    ):
        with pytest.raises(InputError, match=words):
            read_weights(save(tmp_path / name, data, **entries))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="not readable as a PyTorch file"):
        read_weights(tmp_path / "other.zip")


def test_safetensors(tmp_path):
    save_file({"w": BASE, "n": np.array([3], np.int64)}, tmp_path / "w.safetensors")
    got = read_weights(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(got["w"], BASE)
    assert got["n"].dtype == np.int64
