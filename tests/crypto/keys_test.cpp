// Keys of encrypted images, as the options of the command line and the terminal give them.

#include <filesystem>
#include <map>

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
import fcntl, os, pty, signal, sys, termios, time
def run(answer, *command, messages=None):
    terminal, end = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(end, number)
        if messages:
            os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT), 2)
        os.execv(sys.argv[1], ("qcow",) + command)
    def shows():
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)
    def stop_and_go_on():
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        modes = termios.tcgetattr(terminal)
        modes[3] |= termios.ECHO
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        os.kill(pid, signal.SIGCONT)
        for _ in range(6000):
            if not shows():
                return
            time.sleep(0.01)
        raise Exception("it shows what is typed after it was stopped")
    said = b""
    while b"Key of" not in said:
        said += os.read(terminal, 1000)
    assert not shows()
    stop_and_go_on()
    os.write(terminal, answer)
    status = os.waitpid(pid, 0)[1]
    assert shows()
    os.close(end)
    os.close(terminal)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
assert run(b"x\n", "read", "image", "0", "512") == 0
assert run(b"y\n", "read", "image", "0", "512") == -1
assert run(b"x\n", "read", "image", "0", "512", messages="log") == 0
for command in ("read", "image", "0", "512"), ("zero", "image", "0", "512"):
    assert run(b"\x03", *command) == signal.SIGINT, command
print("good")
)";
    EXPECT_EQ(must_run({"python3", "-c", script, QCOW_TOOL}, directory_.path()).out, "good\n");
}

TEST_F(KeysTest, SecretsThatAnOptionNamesAreForItAlone) {
    make_qcow2("disk.qcow2");
    put_file(directory_.file("new"), "new");
    const auto with_both = [](const std::string& command, const Arguments& rest) {
        return joined_arguments({command, "--object", secret_option, "--object", "secret,id=n,data=new"}, rest);
    };
    const std::string add = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10";
    expect_refusal({"amend", "--object", "secret,id=n,data=new", "-o", add, "disk.qcow2"},
                   HasSubstr("no terminal to ask for its key"));
    must_tool(with_both("amend", {"-o", add, "disk.qcow2"}));
    EXPECT_EQ(tool({"compare", "--key", "new", "-F", "raw", "disk.qcow2", "disk.raw"}).status, 0);
    must_tool(with_both("convert", {"-O", "luks", "-o", "key-secret=n,iter-time=10", "disk.qcow2", "new.luks"}));
    EXPECT_EQ(tool({"compare", "--key", "new", "-f", "luks", "-F", "raw", "new.luks", "disk.raw"}).status, 0);
    // Of two that nothing names, neither is tried. The remedy is one that every command has.
    const std::map<std::string, Arguments> commands = {
        {"read", {"disk.qcow2", "0", "512"}}, {"zero", {"disk.qcow2", "0", "512"}}, {"resize", {"disk.qcow2", "8M"}}};
    for (const auto& [command, rest] : commands) {
        expect_refusal(with_both(command, rest), AllOf(HasSubstr("several secrets"), HasSubstr("--key FILE")));
        must_tool(with_both(command, joined_arguments({"--key", "key"}, rest)));
    }
    expect_refusal(with_both("create", {"-o", "encrypt.format=luks", "new.qcow2", "1M"}),
                   AllOf(HasSubstr("several secrets"), HasSubstr("-o encrypt.key-secret=ID")));
}

TEST_F(KeysTest, ErrorsShowNoPartOfASecret) {
    for (const std::string secret : {"secret,id=s,data=a,Tr0ub4", "data=Tr0ub4,id=s", "Tr0ub4",
                                     "secret,id=s,data=a,format=Tr0ub4", "secret,Tr0ub4=a,id=s"}) {
        expect_refusal({"create", "--object", secret, "-o", "encrypt.format=luks", "new.qcow2", "1M"},
                       AllOf(HasSubstr("--object"), Not(HasSubstr("Tr0ub4"))));
    }
}

TEST_F(KeysTest, MoreOrFewerThanThereAreLayers) {
    make_qcow2("base.qcow2");
    put_file(directory_.file("other"), "other");
    put_file(directory_.file("new"), "new");
    must_tool({"create", "-q", "-b", "base.qcow2", "-F", "qcow2", "--key", "other", "-o",
               "encrypt.format=luks,encrypt.iter-time=10", "over.qcow2"});
    const auto to_luks = [](const Arguments& keys) {
        return joined_arguments({"convert", "-O", "luks", "-o", "iter-time=10"},
                                joined_arguments(keys, {"over.qcow2", "new.luks"}));
    };
    // The new image does not share the key of the lowest layer without being told to.
    expect_refusal(to_luks({"--key", "other", "--key", "key"}),
                   AllOf(HasSubstr("base.qcow2: no key is left"), HasSubstr("the new image")));
    EXPECT_FALSE(std::filesystem::exists(directory_.file("new.luks")));
    EXPECT_EQ(must_tool(to_luks({"--key", "other", "--key", "key", "--key", "new"})).err, "");
    EXPECT_EQ(tool({"compare", "--key", "new", "-f", "luks", "-F", "raw", "new.luks", "disk.raw"}).status, 0);
    const auto read = tool({"read", "--key", "other", "--key", "key", "--key", "new", "over.qcow2", "0", "1"});
    EXPECT_EQ(read.status, 0);
    EXPECT_THAT(read.err, HasSubstr("of the 3 keys (--key, --key-fd), only 2 were needed"));
}

/// Who gives a key for what is made wants it to be encrypted.
TEST_F(KeysTest, NewImagesAreNotPlainDespiteAKey) {
    make_qcow2("disk.qcow2");
    std::filesystem::create_directory(directory_.file("tree"));
    const auto remedy = HasSubstr("encrypt.format=luks");
    expect_refusal({"create", "--key", "key", "new", "1M"}, remedy);
    expect_refusal({"create", "--key-fd", "0", "new", "1M"}, remedy);
    expect_refusal({"create", "-f", "raw", "--key", "key", "new", "1M"}, remedy);
    expect_refusal({"convert", "-f", "raw", "-O", "qcow2", "--key", "key", "disk.raw", "new"}, remedy);
    expect_refusal({"convert", "-f", "raw", "--key", "key", "disk.raw", "new"}, remedy);
    expect_refusal({"convert", "-O", "qcow2", "--key", "key", "--key", "wrong", "disk.qcow2", "new"}, remedy);
    expect_refusal({"build", "--fs", "ext4", "--key", "key", "-O", "qcow2", "-o", "new", "tree"}, remedy);
    EXPECT_FALSE(std::filesystem::exists(directory_.file("new")));
    // A key that opens what is read is in use.
    EXPECT_EQ(must_tool({"convert", "-O", "qcow2", "--key", "key", "disk.qcow2", "plain.qcow2"}).err, "");
    EXPECT_EQ(must_tool({"create", "-q", "--key", "key", "-b", "disk.qcow2", "-F", "qcow2", "over.qcow2"}).err, "");
    EXPECT_EQ(must_tool({"convert", "-O", "qcow2", "--key", "key", "-B", "disk.qcow2", "-F", "qcow2", "plain.qcow2",
                         "differs.qcow2"})
                  .err,
              "");
    const auto read = tool({"read", "--key", "key", "plain.qcow2", "0", "1"});
    EXPECT_EQ(read.status, 0);
    EXPECT_THAT(read.err, HasSubstr("warning: no key (--key, --key-fd) was needed"));
}

TEST_F(KeysTest, OptionsThatContradictTheImageOrEachOther) {
    make_qcow2("disk.qcow2");
    const auto read = [](const std::string& options) {
        return Arguments{"read",
                         "--object",
                         secret_option,
                         "--image-opts",
                         "driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=s," + options,
                         "0",
                         "1"};
    };
    must_tool(read("encrypt.format=luks"));
    expect_refusal(read("encrypt.format=aes"), AllOf(HasSubstr("luks"), HasSubstr("encrypt.format=aes")));
    expect_refusal({"read", "--object", secret_option, "--object", "secret,id=s,data=y", "disk.qcow2", "0", "1"},
                   HasSubstr("given twice"));
}

/// Each layer has a key of its own, and each job finds it, whichever chain it opens first.
TEST_F(KeysTest, ImageOptionsNameTheKeysOfImagesThatAreChanged) {
    for (const std::string name : {"top", "new"}) put_file(directory_.file(name), name);
    make_qcow2("disk.qcow2");
    const auto encrypted = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=";
    const Arguments secrets = {"--object", secret_option,         "--object", "secret,id=t,file=top",
                               "--object", "secret,id=n,file=new"};
    const auto with_secrets = [&](Arguments command) {
        command.insert(command.begin() + 1, secrets.begin(), secrets.end());
        return command;
    };
    must_tool({"convert", "-O", "qcow2", "--object", secret_option, "--object", "secret,id=n,file=new", "-o",
               std::string(encrypted) + "n", "disk.qcow2", "new.qcow2"});
    must_tool({"create", "-q", "--object", secret_option, "--object", "secret,id=t,file=top", "-o",
               std::string(encrypted) + "t", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"});
    const auto top = [](const std::string& below) {
        return "driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=t,backing.encrypt.key-secret=" + below;
    };
    const auto contents = [&](const std::string& below) {
        return must_tool(with_secrets({"read", "--image-opts", top(below), "0", "1M"})).out;
    };
    for (const Arguments& command : {Arguments{"zero", "--image-opts", top("s"), "512", "700"},
                                     {"discard", "--image-opts", top("s"), "64k", "64k"},
                                     {"resize", "--image-opts", top("s"), "+1M"},
                                     {"bitmap", "--add", "--image-opts", top("s"), "changes"},
                                     {"amend", "-o", "lazy_refcounts=on", "--image-opts", top("s")}})
        must_tool(with_secrets(command));
    // These open the image alone, by its metadata.
    must_tool(with_secrets({"compact", "--zeroes", "--image-opts", top("s")}));
    must_tool(with_secrets({"check", "-r", "all", "--image-opts", top("s")}));
    must_tool(with_secrets(
        {"amend", "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", "--image-opts", top("s")}));
    const auto before = contents("s");
    EXPECT_EQ(before.substr(512, 700), std::string(700, '\0'));
    // The new backing file is opened first, and its secret is not in the options: it comes from its name.
    must_tool(with_secrets({"rebase", "--image-opts", top("s"), "-F", "qcow2", "-b",
                            R"(json:{"file.filename":"new.qcow2","encrypt.key-secret":"n"})"}));
    EXPECT_EQ(contents("n"), before);
    // The base is opened as a layer, and then as an image of its own.
    must_tool(with_secrets({"commit", "--image-opts", top("n")}));
    EXPECT_EQ(contents("n"), before);
    EXPECT_EQ(must_tool(with_secrets({"read", "--image-opts",
                                      "driver=qcow2,file.filename=new.qcow2,encrypt.key-secret=n", "0", "1M"}))
                  .out,
              before);
    expect_refusal(with_secrets({"resize", "--image-opts", top("n") + ",backing.file.filename=disk.qcow2", "+1M"}),
                   HasSubstr("the backing file that it names"));
}

/// As long as cryptsetup takes them.
TEST_F(KeysTest, KeyFilesMayBeLong) {
    auto random = Random::named("long key");
    put_file(directory_.file("long"), random.bytes(300'000));
    must_tool({"create", "-q", "-f", "luks", "--key", "long", "-o", "iter-time=10", "new.luks", "1M"});
    must_tool({"read", "-f", "luks", "--key", "long", "new.luks", "0", "1"});
    must_run({"cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", "long", "new.luks"},
             directory_.path());
    std::filesystem::resize_file(directory_.file("long"), 8 * MiB + 1);
    expect_refusal({"read", "-f", "luks", "--key", "long", "new.luks", "0", "1"}, HasSubstr("more than 8388608 bytes"));
}

TEST_F(KeysTest, DataAreTakenAsTheyAre) {
    for (const std::string key : {"a,b", ",", "a=b,data=c"}) {
        std::string written;
        for (const char c : key) written += c == ',' ? ",," : std::string(1, c);
        put_file(directory_.file("same"), key);
        must_tool({"create", "-q", "--object=secret,data=" + written + ",id=a", "-o",
                   "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=a", "new.qcow2", "1M"});
        must_tool({"read", "--key", "same", "new.qcow2", "0", "1"});
    }
}

TEST_F(KeysTest, ALineFeedAtTheEndIsMentioned) {
    make_qcow2("disk.qcow2");
    put_file(directory_.file("line"), "x\n");
    expect_refusal({"read", "--key", "line", "disk.qcow2", "0", "512"},
                   AllOf(HasSubstr("the key is wrong"), HasSubstr("its last byte is a line feed")));
    expect_refusal({"read", "--key", "wrong", "disk.qcow2", "0", "512"}, Not(HasSubstr("line feed")));
}

TEST_F(KeysTest, MeasuringTakesNone) {
    must_tool({"create", "-q", "-f", "luks", "--key", "key", "-o", "iter-time=10", "new.luks", "1M"});
    EXPECT_THAT(must_tool({"measure", "-O", "luks", "--size", "1M"}).out,
                HasSubstr(fmt::format("required size: {}\n", bytes_of("new.luks").size())));
    EXPECT_EQ(must_tool({"measure", "-O", "qcow2", "-o", "encrypt.format=luks", "--size", "1M"}).err, "");
}

TEST_F(KeysTest, OptionsOfNewImagesAreNamedWithWhatIsPossible) {
    const auto refused = [&](const std::string& options, const auto& error) {
        expect_refusal({"create", "-f", "luks", "--key", "key", "-o", options, "new.luks", "1M"}, error);
    };
    refused("cipher-alg=twofish-192", HasSubstr("twofish has keys of 128, 256 bits, and two of them in xts"));
    refused("cipher-alg=cast5-128", HasSubstr("xts needs a cipher with blocks of 128 bits"));
    refused("cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1",
            HasSubstr("aes has no key of 160 bits, which essiv makes with sha1"));
    refused("cipher-mode=ecb,ivgen-alg=essiv", HasSubstr("ecb uses no vectors"));
    refused("hash-alg=md5", HasSubstr("sha1, sha224, sha256, sha384, sha512, ripemd160 are"));
    refused("format=luks2", HasSubstr("luks stands for LUKS1"));
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
