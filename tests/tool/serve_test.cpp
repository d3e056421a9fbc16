// qcow serve as its users start it: real clients, signals, another user; all of it in its sandbox.

#include <sys/stat.h>

#include <fstream>
#include <thread>

#include "support/loop_device.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// Random bytes with holes between, of 64 MiB.
std::string sample_disk() {
    std::string bytes(64 << 20, '\0');
    for (const std::size_t at : {0, 9 << 20, 40 << 20})
        bytes.replace(at, 3 << 20, Random(static_cast<std::uint64_t>(at)).bytes(3 << 20));
    return bytes;
}

class ServeTest : public testing::Test {
protected:
    void SetUp() override {
        must_qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "64M"}, directory_.path());
        put_file(directory_ / "new.raw", std::string(64 << 20, '\0'));
    }

    static inline const std::string uri = "nbd+unix:///?socket=socket";

    /// A server on a Unix socket that clients can connect to.
    [[nodiscard]] std::unique_ptr<Subprocess> serve(const Arguments& more) const {
        Arguments arguments = {QCOW_TOOL, "serve", "--persistent", "--socket", "socket", "--pid-file", "pid"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        auto server = std::make_unique<Subprocess>(arguments, directory_.path());
        server->wait_for("sandbox: ");
        return server;
    }

    static Finished stop(Subprocess& server) {
        server.signal(SIGTERM);
        auto finished = server.finish(std::chrono::seconds(30));
        EXPECT_EQ(finished.status, 0) << finished.text();
        return finished;
    }

    Finished must(const Arguments& command) const { return must_run(command, directory_.path()); }

    /// The lines of /proc/PID/task/*/status that begin with `name`, without it.
    [[nodiscard]] std::multiset<std::string> thread_status(const std::string& name) const {
        std::string pid;
        std::ifstream(directory_ / "pid") >> pid;
        std::multiset<std::string> found;
        for (const auto& task : std::filesystem::directory_iterator("/proc/" + pid + "/task")) {
            std::ifstream status(task.path() / "status");
            for (std::string line; std::getline(status, line);)
                if (line.starts_with(name + ":\t")) found.insert(line.substr(name.size() + 2));
        }
        return found;
    }

    TemporaryDirectory directory_;
};

TEST_F(ServeTest, EverythingInTheSandbox) {
    for (const std::string image : {"disk.qcow2", "new.raw"}) {
        SCOPED_TRACE(image);
        const std::string format = image == "new.raw" ? "raw" : "qcow2";
        auto server = serve({"-f", format, image});
        auto expected = sample_disk();
        put_file(directory_ / "sample.raw", expected);
        must({"nbdcopy", "sample.raw", uri});
        must({"nbdcopy", uri, "copy.raw"});
        EXPECT_TRUE(file_bytes(directory_ / "copy.raw") == expected);
        // Written, zeroed, trimmed, flushed.
        must({"qemu-io", "-f", "raw", "-c", "write -q -P 90 20M 100k", "-c", "write -q -z 40M 1M", "-c",
              "write -q -z -u 41M 1M", "-c", "discard -q 0 1M", "-c", "flush", uri});
        expected.replace(20 << 20, 100 << 10, std::string(100 << 10, 'Z'));
        expected.replace(40 << 20, 2 << 20, std::string(2 << 20, '\0'));
        expected.replace(0, 1 << 20, std::string(1 << 20, '\0'));
        must({"nbdcopy", uri, "copy.raw"});
        EXPECT_TRUE(file_bytes(directory_ / "copy.raw") == expected);
        EXPECT_THAT(must({"nbdinfo", "--map", uri}).out, AllOf(HasSubstr("data"), HasSubstr("hole")));
        must({"fio", "--name=verify", "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--bsrange=512-128k",
              "--size=64M", "--io_size=32M", "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--fsync=64",
              "--verify_state_save=0"});
        stop(*server);
        EXPECT_FALSE(std::filesystem::exists(directory_ / "socket"));
        EXPECT_FALSE(std::filesystem::exists(directory_ / "pid"));
        if (format == "qcow2") must_qemu_img({"check", "-q", image}, directory_.path());
    }
}

TEST_F(ServeTest, ABlockDevice) {
    const LoopDevice device(8 << 20);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    auto server = serve({"-f", "raw", device.path()});
    must({"qemu-io",
          "-f",
          "raw",
          "-c",
          "write -q -P 90 0 4M",
          "-c",
          "write -q -z 1M 1M",
          "-c",
          "write -q -z -u 2M 1M",
          "-c",
          "discard -q 5M 1M",
          "-c",
          "flush",
          "-c",
          "read -q -P 90 0 1M",
          "-c",
          "read -q -P 0 1M 2M",
          "-c",
          "read -q -P 90 3M 1M",
          uri});
    stop(*server);
}

TEST_F(ServeTest, EveryThreadIsConfined) {
    auto server = serve({"disk.qcow2"});
    Subprocess load({"fio", "--name=load", "--ioengine=nbd", "--uri=" + uri, "--rw=randrw", "--bs=256k", "--size=64M",
                     "--time_based", "--runtime=2", "--iodepth=32"},
                    directory_.path());
    std::size_t threads = 0;
    for (int i = 0; i < 200 && threads < 3; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        threads = thread_status("Seccomp").size();
    }
    EXPECT_GE(threads, 3U);
    const auto seccomp = thread_status("Seccomp");
    const auto no_new_privileges = thread_status("NoNewPrivs");
    load.finish();
    const auto said = stop(*server).err;
    if (said.find("sandbox: Landlock, seccomp\n") == std::string::npos) GTEST_SKIP() << said;
    EXPECT_THAT(seccomp, testing::Each("2"));
    EXPECT_THAT(no_new_privileges, testing::Each("1"));
}

TEST_F(ServeTest, WithoutASandbox) {
    auto server = serve({"--sandbox=off", "disk.qcow2"});
    EXPECT_THAT(thread_status("Seccomp"), testing::Each("0"));
    must({"nbdinfo", uri});
    EXPECT_THAT(stop(*server).err, HasSubstr("sandbox: off"));
}

TEST_F(ServeTest, ItsWarningIsPrintable) {
    std::filesystem::rename(directory_ / "new.raw", directory_ / "new\x1b[2J.raw");
    auto server = serve({"new\x1b[2J.raw"});
    EXPECT_THAT(stop(*server).err, HasSubstr(R"(warning: new\x1b[2J.raw: that it is raw was only guessed)"));
}

#ifdef QCOW_HAS_TLS
TEST_F(ServeTest, OverTlsInTheSandbox) {
    put_file(directory_ / "keys", "alice:000102030405060708090a0b0c0d0e0f\n");
    std::filesystem::permissions(directory_ / "keys", std::filesystem::perms(0600));
    put_file(directory_ / "sample.raw", sample_disk());
    auto server = serve({"--tls-psk", "keys", "disk.qcow2"});
    const std::string secure = "nbds+unix://alice@/?socket=socket&tls-psk-file=" + (directory_ / "keys");
    must({"nbdcopy", "sample.raw", secure});
    must({"nbdcopy", secure, "copy.raw"});
    EXPECT_TRUE(file_bytes(directory_ / "copy.raw") == sample_disk());
    stop(*server);
}
#endif

TEST_F(ServeTest, OnlyWhoReadsSharesByForce) {
    auto writer = serve({"disk.qcow2"});
    const auto second = [&](const Arguments& more) {
        Arguments arguments = {QCOW_TOOL, "serve", "--socket", "second", "--force-share", "disk.qcow2"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    };
    const auto refused = run(second({}), directory_.path());
    EXPECT_EQ(refused.status, 1) << refused.text();
    EXPECT_THAT(refused.err, AllOf(HasSubstr("--force-share"), HasSubstr("add --read-only or --snapshot")));
    EXPECT_FALSE(std::filesystem::exists(directory_ / "second"));
    Subprocess reader(second({"--read-only", "--persistent"}), directory_.path());
    reader.wait_for("sandbox: ");
    stop(reader);
    stop(*writer);
}

/// The socket comes from the client, which ends the server by leaving.
TEST_F(ServeTest, StartedByItsClient) {
    put_file(directory_ / "sample.raw", sample_disk());
    must({"nbdcopy", "--", "sample.raw", "[", QCOW_TOOL, "serve", "disk.qcow2", "]"});
    const auto copied = must({"nbdcopy", "--", "[", QCOW_TOOL, "serve", "--read-only", "disk.qcow2", "]", "copy.raw"});
    EXPECT_EQ(copied.out, "");
    EXPECT_TRUE(file_bytes(directory_ / "copy.raw") == sample_disk());
    must_qemu_img({"check", "-q", "disk.qcow2"}, directory_.path());
}

TEST_F(ServeTest, AsAnotherUser) {
    if (getuid() != 0) GTEST_SKIP() << "only root can become another user";
    std::filesystem::permissions(directory_ / "disk.qcow2", std::filesystem::perms(0600));
    auto server = serve({"--user", "nobody", "disk.qcow2"});
    EXPECT_THAT(thread_status("Uid"), testing::Each("65534\t65534\t65534\t65534"));
    EXPECT_THAT(thread_status("Gid"), testing::Each("65534\t65534\t65534\t65534"));
    EXPECT_THAT(thread_status("Groups"), testing::Each(testing::MatchesRegex(" *")));
    EXPECT_THAT(thread_status("CapEff"), testing::Each("0000000000000000"));
    struct stat status = {};
    ASSERT_EQ(stat((directory_ / "socket").c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, 65534U);
    ASSERT_EQ(stat((directory_ / "pid").c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, 0U);  // root believes what it says
    put_file(directory_ / "sample.raw", sample_disk());
    must({"nbdcopy", "sample.raw", uri});
    must({"nbdcopy", uri, "copy.raw"});
    EXPECT_TRUE(file_bytes(directory_ / "copy.raw") == sample_disk());
    EXPECT_THAT(stop(*server).err, HasSubstr("user nobody"));
    // The directory is root's, so both are left; a server that comes after takes their places.
    EXPECT_TRUE(std::filesystem::exists(directory_ / "socket"));
    ASSERT_EQ(chown(directory_.path().c_str(), 65534, 65534), 0);
    server = serve({"--user", "nobody", "disk.qcow2"});
    stop(*server);
    EXPECT_FALSE(std::filesystem::exists(directory_ / "socket"));
    EXPECT_FALSE(std::filesystem::exists(directory_ / "pid"));
    const auto refused =
        run({QCOW_TOOL, "serve", "--socket", "socket", "--user", "no such user", "disk.qcow2"}, directory_.path());
    EXPECT_EQ(refused.status, 1);
    EXPECT_THAT(refused.err, HasSubstr("no such user"));
    EXPECT_FALSE(std::filesystem::exists(directory_ / "socket"));
}

}  // namespace
}  // namespace qcow::test
