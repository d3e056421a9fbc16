// Keys of encrypted images, as the options of the command line and the terminal give them.

#include "crypto/encryption_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class KeysTest : public EncryptionTest {};

TEST_F(KeysTest, KeysThatAreWrongOrMissing) {
    make_qcow2("disk.qcow2");
    expect_refusal({"convert", "--key", "wrong", "disk.qcow2", "out.raw"},
                   AllOf(HasSubstr("disk.qcow2: the key is wrong"), HasSubstr("1 key slots")));
    expect_refusal({"convert", "disk.qcow2", "out.raw"}, HasSubstr("--key FILE"));
    expect_refusal({"convert", "--key", "absent", "disk.qcow2", "out.raw"}, HasSubstr("absent"));
    expect_refusal({"convert", "--object", "secret,id=a,data=x", "--object", "secret,id=b,data=y", "disk.qcow2", "out"},
                   HasSubstr("several secrets"));
    expect_refusal({"convert", "--object", "secret,id=s,data=#,format=base64", "disk.qcow2", "out"},
                   HasSubstr("not base64"));
    expect_refusal({"create", "-o", "encrypt.format=luks,encrypt.key-secret=nobody", "new.qcow2", "1M"},
                   HasSubstr("nobody"));
    must_tool({"convert", "--object", "secret,id=s,data=eA==,format=base64", "disk.qcow2", "out.raw"});
    const auto line =
        run({"sh", "-c", "echo x | " QCOW_TOOL " convert --key - disk.qcow2 out2.raw"}, directory_.path());
    EXPECT_EQ(line.status, 0) << line.text();
    const auto fd = run({"sh", "-c", QCOW_TOOL " convert --key-fd 5 disk.qcow2 out3.raw 5< key"}, directory_.path());
    EXPECT_EQ(fd.status, 0) << fd.text();
    // What was not read to its end is there for the next layer, too.
    must_tool({"create", "-q", "--key", "key", "-o", "encrypt.format=luks,encrypt.iter-time=10", "-b", "disk.qcow2",
               "-F", "qcow2", "top.qcow2"});
    std::ofstream(directory_.file("other")) << "other";
    for (const auto* const command :
         {"echo x | " QCOW_TOOL " convert --key - top.qcow2 out.raw",
          QCOW_TOOL " convert --key-fd 5 top.qcow2 out.raw 5< key",
          QCOW_TOOL
          " convert --key-fd 5 -O qcow2 -o encrypt.format=luks,encrypt.iter-time=10 disk.qcow2 same.qcow2 5< key",
          "printf 'x\\nother\\n' | " QCOW_TOOL
          " convert --key - --key - -O qcow2 -o encrypt.format=luks,encrypt.iter-time=10 disk.qcow2 new.qcow2",
          QCOW_TOOL " read --key other new.qcow2 0 1",
          QCOW_TOOL " convert --key-fd 5 --key other -O luks -o iter-time=10 disk.qcow2 new.luks 5< key",
          QCOW_TOOL " read -f luks --key other new.luks 0 1"}) {
        const auto done = run({"sh", "-c", command}, directory_.path());
        EXPECT_EQ(done.status, 0) << command << "\n" << done.text();
    }
    // What needs no key asks for none.
    for (const auto* command : {"info", "check", "map"}) must_tool({command, "disk.qcow2"});
    must_tool({"measure", "-O", "qcow2", "disk.qcow2"});
    must_tool({"snapshot", "--list", "disk.qcow2"});
    EXPECT_THAT(must_tool({"info", "--json", "disk.qcow2"}).out, HasSubstr("aes-xts-plain64"));
}

/// Anybody could open an image with an empty key.
TEST_F(KeysTest, NewKeysAreNotEmpty) {
    make_qcow2("disk.qcow2");
    const std::string create = " create -o encrypt.format=luks,encrypt.iter-time=10";
    for (const std::string& command :
         {create + " --key - new.qcow2 1M < /dev/null", create + " --key /dev/null new.qcow2 1M",
          create + " --object secret,id=s,file=/dev/null new.qcow2 1M",
          create + ",encrypt.key-secret=s --object secret,id=s,data= new.qcow2 1M",
          create + ",encrypt.key-secret=s --object secret,id=s,data=,format=base64 new.qcow2 1M",
          std::string(
              " amend --key key --object secret,id=n,data= -o encrypt.state=active,encrypt.new-secret=n disk.qcow2")}) {
        const auto refused = run({"sh", "-c", QCOW_TOOL + command}, directory_.path());
        EXPECT_EQ(refused.status, 1) << command;
        EXPECT_THAT(refused.err, HasSubstr("the new key is empty")) << command;
    }
    for (const auto* const text : {"e", "eA==junk", "eA=", "eA===", "eA==eA=="}) {
        expect_refusal(
            {"convert", "--object", std::string("secret,id=s,format=base64,data=") + text, "disk.qcow2", "out"},
            HasSubstr("not base64"));
    }
}

/// Asks on a terminal that does not show the answer, and shows what is typed again when a signal ends the command.
TEST_F(KeysTest, KeysAreTypedUnseen) {
    must_tool({"create", "-q", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--key", "key", "image", "1M"});
    const char* const script = R"(
import fcntl, os, pty, signal, sys, termios
def run(answer, *command):
    terminal, end = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(end, number)
        os.execv(sys.argv[1], ("qcow",) + command)
    def shows():
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)
    said = b""
    while b"Key of" not in said:
        said += os.read(terminal, 1000)
    assert not shows()
    os.write(terminal, answer)
    status = os.waitpid(pid, 0)[1]
    assert shows()
    os.close(end)
    os.close(terminal)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
assert run(b"x\n", "read", "image", "0", "512") == 0
assert run(b"y\n", "read", "image", "0", "512") == -1
for command in ("read", "image", "0", "512"), ("zero", "image", "0", "512"):
    assert run(b"\x03", *command) == signal.SIGINT, command
print("good")
)";
    EXPECT_EQ(must_run({"python3", "-c", script, QCOW_TOOL}, directory_.path()).out, "good\n");
}

/// A list of processes does not show a secret of the command line.
TEST_F(KeysTest, SecretsAreHiddenFromProcessLists) {
    make_qcow2("disk.qcow2");
    const auto shown =
        run({"sh", "-c",
             QCOW_TOOL " serve -r --persistent --socket socket --object secret,id=s,data=x disk.qcow2 > log & pid=$!; "
                       "until [ -S socket ] || ! kill -0 $pid; do sleep 0.02; done; "
                       "tr '\\0' ' ' < /proc/$pid/cmdline; "
                       "qemu-img convert -f raw -O raw nbd+unix:///?socket=socket served; kill $pid"},
            directory_.path());
    EXPECT_EQ(shown.status, 0) << shown.text();
    EXPECT_THAT(shown.out, AllOf(HasSubstr("secret,id=s,data=*"), Not(HasSubstr("data=x"))));
    EXPECT_TRUE(bytes_of("served") == bytes_of("disk.raw"));
}

}  // namespace
}  // namespace qcow::test
