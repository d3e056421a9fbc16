// Other people's clients on `qcow serve`: libnbd's, QEMU's and fio.

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class Clients : public testing::Test {
protected:
    void SetUp() override {
        put_file(directory_.file("disk.raw"), random_.bytes(std::size_t{5} << 20));
        must_run({"truncate", "-s", "20M", "disk.raw"}, directory_.path());
        must_qemu_img({"convert", "-f", "raw", "-O", "qcow2", "-c", "disk.raw", "disk.qcow2"}, directory_.path());
    }

    /// A server on the socket "socket", until the test is done.
    void serve(Arguments arguments) {
        arguments.insert(arguments.begin(), {QCOW_TOOL, "serve", "--socket", "socket", "--pid-file", "pid"});
        server_ = std::make_unique<Subprocess>(arguments, directory_.path());
        for (int i = 0; i < 1000 && !std::filesystem::exists(directory_.file("pid")); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }

    /// SIGTERM; the server is to end well.
    void stop() {
        server_->signal(SIGTERM);
        const auto finished = server_->finish();
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err, testing::MatchesRegex("qcow: sandbox: [^\n]*\n"));
    }

    [[nodiscard]] std::string uri(const std::string& name = "") const {
        return "nbd+unix:///" + name + "?socket=" + directory_.file("socket");
    }

    void expect_same(const std::string& a, const std::string& b) const {
        EXPECT_EQ(first_difference(ReferenceFile(directory_.file(a)), ReferenceFile(directory_.file(b))), std::nullopt);
    }

    /// Whether the server goes past the system's cache for that file.
    [[nodiscard]] bool has_opened_directly(const std::string& path) const {
        const auto process = fmt::format("/proc/{}/", std::stol(read_file(directory_.file("pid"))));
        for (const auto& entry : std::filesystem::directory_iterator(process + "fd")) {
            if (std::filesystem::read_symlink(entry) != std::filesystem::canonical(path)) continue;
            const auto about = read_file(process + "fdinfo/" + entry.path().filename().string());
            const auto flags = std::stol(about.substr(about.find("flags:") + 6), nullptr, 8);
            if ((flags & O_DIRECT) != 0) return true;
        }
        return false;
    }

    TemporaryDirectory directory_;
    Random random_ = Random::named("clients");
    std::unique_ptr<Subprocess> server_;
};

TEST_F(Clients, NbdinfoAndNbdcopyOnASocketThatTheyHandOver) {
    const auto info = json::parse(
        must_run({"nbdinfo", "--json", "--", "[", QCOW_TOOL, "serve", "--read-only", "-A", "disk.qcow2", "]"},
                 directory_.path())
            .out);
    const auto& exported = info["exports"][0];
    EXPECT_EQ(exported["export-size"], 20 << 20);
    EXPECT_EQ(exported["is_read_only"], true);
    EXPECT_EQ(exported["can_multi_conn"], true);
    EXPECT_EQ(exported["contexts"], json({"base:allocation", "qemu:allocation-depth"}));
    EXPECT_EQ(exported["block_size_preferred"], 65536);
    must_run({"nbdcopy", "--", "[", QCOW_TOOL, "serve", "--read-only", "disk.qcow2", "]", "copy.raw"},
             directory_.path());
    expect_same("disk.raw", "copy.raw");
}

TEST_F(Clients, NbdinfoMapsTheSameAsQemu) {
    serve({"--persistent", "--read-only", "disk.qcow2"});
    const auto map = json::parse(must_run({"nbdinfo", "--map", "--json", uri()}).out);
    std::uint64_t data = 0;
    std::uint64_t holes = 0;
    for (const auto& run : map) (run["type"] == 0 ? data : holes) += run["length"].get<std::uint64_t>();
    EXPECT_EQ(data, 5U << 20);
    EXPECT_EQ(holes, 15U << 20);
    stop();
}

TEST_F(Clients, QemuReadsAndComparesTheDisk) {
    serve({"--persistent", "--read-only", "disk.qcow2"});
    must_qemu_img({"convert", "-f", "raw", "-O", "raw", uri(), "copy.raw"}, directory_.path());
    expect_same("disk.raw", "copy.raw");
    must_qemu_img({"compare", "-f", "raw", "-F", "raw", uri(), "disk.raw"}, directory_.path());
    const auto map = qemu_img_json({"map", "--output=json", "-f", "raw", uri()});
    EXPECT_EQ(map.size(), 2U);
    const auto refused = run({"qemu-io", "-f", "raw", "-c", "write 0 4k", uri()});
    EXPECT_THAT(refused.text(), HasSubstr("Permission denied"));
    stop();
}

TEST_F(Clients, QemuWritesToARawImage) {
    serve({"--persistent", "-f", "raw", "disk.raw"});
    must_qemu_io(uri(), "raw",
                 {"write -q -P 65 1000k 3M", "write -q -f -P 66 9M 64k", "write -q -z 2M 512k", "write -q -z -u 12M 1M",
                  "discard -q 0 1M", "flush"});
    must_qemu_io(uri(), "raw", {"read -q -P 65 1M 1M", "read -q -P 0 2M 512k", "read -q -P 66 9M 64k"});
    stop();
    must_qemu_io("disk.raw", "raw",
                 {"read -q -P 65 1M 1M", "read -q -P 0 2M 512k", "read -q -P 66 9M 64k", "read -q -P 0 0 500k"},
                 directory_.path());
}

TEST_F(Clients, NbdcopyFillsARawImageOverSeveralConnections) {
    must_run({"truncate", "-s", "20M", "target.raw"}, directory_.path());
    serve({"--persistent", "-f", "raw", "target.raw"});
    must_run({"nbdcopy", "--flush", "--connections=4", "disk.raw", uri()}, directory_.path());
    stop();
    expect_same("disk.raw", "target.raw");
}

TEST_F(Clients, FioVerifiesWhatItWrote) {
    must_run({"truncate", "-s", "64M", "fio.raw"}, directory_.path());
    serve({"--persistent", "-f", "raw", "fio.raw"});
    must_run({"fio", "--name=verify", "--ioengine=nbd", "--uri=" + uri(), "--rw=randwrite", "--bsrange=512-256k",
              "--iodepth=32", "--size=16m", "--offset_increment=16m", "--numjobs=4", "--thread", "--verify=crc32c",
              "--verify_fatal=1", "--fsync=50"},
             directory_.path());
    stop();
}

TEST_F(Clients, SeveralImagesAreSeveralExports) {
    serve({"--persistent", "--read-only", "disk.raw", "disk.qcow2", "-D", "plain", "-D", "compressed"});
    const auto list = json::parse(must_run({"nbdinfo", "--list", "--json", uri()}).out)["exports"];
    ASSERT_EQ(list.size(), 2U);
    EXPECT_EQ(list[0]["export-name"], "disk.raw");
    EXPECT_EQ(list[1]["description"], "compressed");
    must_qemu_img({"compare", "-f", "raw", "-F", "raw", uri("disk.raw"), uri("disk.qcow2")});
    stop();
}

TEST_F(Clients, WritePastTheCache) {
    const TemporaryDirectory disk(on_a_disk);
    std::filesystem::copy(directory_.file("disk.qcow2"), disk.file("disk.qcow2"));
    if (const auto direct = open_file(disk.file("disk.qcow2"), {.direct = true});
        !direct && direct.error().code == Errc::unsupported)
        GTEST_SKIP() << direct.error().message();
    serve({"--persistent", "--cache", "none", "--format", "qcow2", disk.file("disk.qcow2")});
    EXPECT_TRUE(has_opened_directly(disk.file("disk.qcow2")));
    must_qemu_io(uri(), "raw", {"write -q -P 65 1000001 3000000", "write -q -z 2M 512k", "flush"});
    stop();
    must_qemu_io("disk.qcow2", "qcow2", {"read -q -P 65 1000001 1000000", "read -q -P 0 2M 512k"}, disk.path());
}

/// Two bitmaps that QEMU made, with what was written since.
class BitmapClients : public Clients {
protected:
    void SetUp() override {
        Clients::SetUp();
        must_qemu_img({"bitmap", "--add", "-g", "4k", "disk.qcow2", "fine"}, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q 1M 10k", "write -q 19M 4k"}, directory_.path());
        must_qemu_img({"bitmap", "--add", "-g", "1M", "disk.qcow2", "coarse"}, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q 5M 1", "write -q 7M 512"}, directory_.path());
    }

    [[nodiscard]] json map(const std::string& bitmap, Arguments server) const {
        Arguments command = {"nbdinfo", "--json", "--map=qemu:dirty-bitmap:" + bitmap, "--"};
        command.insert(command.end(), server.begin(), server.end());
        return json::parse(must_run(command, directory_.path()).out);
    }
    [[nodiscard]] json qemu_map(const std::string& bitmap) const {
        return map(bitmap, {"[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, "disk.qcow2", "]"});
    }
};

TEST_F(BitmapClients, SeeWhatQemuShowsThem) {
    for (const auto* bitmap : {"fine", "coarse"}) {
        const auto ours = map(bitmap, {"[", QCOW_TOOL, "serve", "-r", "-B", "fine", "-B", "coarse", "disk.qcow2", "]"});
        EXPECT_EQ(ours, qemu_map(bitmap)) << bitmap;
        EXPECT_GT(ours.size(), 4U);
    }
}

TEST_F(BitmapClients, SeeWhatTheyWriteAtOnceAndQemuLater) {
    serve({"--persistent", "-B", "fine", "disk.qcow2"});
    must_qemu_io(uri(), "raw", {"write -q 10M 4k", "write -q -z 11M 8k", "discard -q 13M 64k"});
    const auto now = map("fine", {uri()});
    const auto is_dirty = [&](std::uint64_t at) {
        for (const auto& run : now) {
            const auto begin = run["offset"].get<std::uint64_t>();
            if (at >= begin && at < begin + run["length"].get<std::uint64_t>()) return run["type"] == 1;
        }
        return false;
    };
    for (const std::uint64_t at : {10 << 20, (11 << 20) + 8191, 13 << 20, 19 << 20}) EXPECT_TRUE(is_dirty(at)) << at;
    for (const std::uint64_t at : {(10 << 20) + 4096, 12 << 20, 2 << 20}) EXPECT_FALSE(is_dirty(at)) << at;
    stop();
    EXPECT_EQ(qemu_map("fine"), now);
}

TEST_F(BitmapClients, AreNotServedBitmapsThatCannotBe) {
    const auto missing = run({QCOW_TOOL, "serve", "-r", "-B", "none", "disk.qcow2"}, directory_.path());
    EXPECT_EQ(missing.status, 1);
    EXPECT_THAT(missing.err, HasSubstr("there is no bitmap \"none\""));
    serve({"--persistent", "disk.qcow2"});  // and is killed, which leaves them in use
    must_qemu_io(uri(), "raw", {"write -q 0 1"});
    server_->signal(SIGKILL);
    server_->finish();
    const auto in_use = run({QCOW_TOOL, "serve", "-r", "-B", "fine", "disk.qcow2"}, directory_.path());
    EXPECT_EQ(in_use.status, 1);
    EXPECT_THAT(in_use.err, HasSubstr("cannot be trusted"));
}

TEST_F(Clients, ASnapshotIsServedReadOnly) {
    must_qemu_img({"snapshot", "-c", "monday", "disk.qcow2"}, directory_.path());
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 1 0 1M"}, directory_.path());
    serve({"--persistent", "--snapshot", "monday", "disk.qcow2"});
    must_qemu_img({"compare", "-f", "raw", "-F", "raw", uri(), "disk.raw"}, directory_.path());
    stop();
}

TEST_F(Clients, TheServerEndsWithItsClient) {
    serve({"--read-only", "--export-name", "named", "disk.raw"});
    EXPECT_EQ(must_run({"nbdinfo", "--size", uri("named")}).out, "20971520\n");
    const auto finished = server_->finish();
    EXPECT_EQ(finished.status, 0) << finished.text();
    EXPECT_FALSE(std::filesystem::exists(directory_.file("socket")));
    EXPECT_FALSE(std::filesystem::exists(directory_.file("pid")));
}

TEST_F(Clients, AServiceManagerIsTold) {
    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    const auto path = directory_.file("notify");
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    ASSERT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    const timeval timeout = {20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    const auto told = [&] {
        std::array<char, 100> text = {};
        const auto n = recv(fd, text.data(), text.size(), 0);
        return n < 0 ? std::string("nothing") : std::string(text.data(), static_cast<std::size_t>(n));
    };
    server_ = std::make_unique<Subprocess>(
        Arguments{"env", "NOTIFY_SOCKET=" + path, QCOW_TOOL, "serve", "-t", "-k", "socket", "-f", "raw", "disk.raw"},
        directory_.path());
    EXPECT_EQ(told(), "READY=1");
    stop();
    EXPECT_EQ(told(), "STOPPING=1");
    close(fd);
}

TEST_F(Clients, WhatCannotBeServed) {
    const auto refused = [&](Arguments arguments) {
        arguments.insert(arguments.begin(), {QCOW_TOOL, "serve"});
        const auto finished = run(arguments, directory_.path());
        EXPECT_EQ(finished.status, 1) << finished.text();
        return finished.err;
    };
    EXPECT_THAT(refused({"absent.raw"}), HasSubstr("absent.raw"));
    EXPECT_THAT(refused({"-k", "no/such/socket", "disk.raw"}), HasSubstr("no/such/socket"));
    EXPECT_THAT(refused({"-k", "disk.raw", "-r", "disk.raw"}), HasSubstr("choose another path"));
    EXPECT_THAT(refused({"-r", "-x", "a", "-x", "a", "disk.raw", "disk.qcow2"}), HasSubstr("\"a\""));
    EXPECT_THAT(refused({"-l", "no such", "disk.qcow2"}), HasSubstr("no such"));
    EXPECT_THAT(refused({"-r", "-x", "a", "-x", "b", "disk.raw"}), HasSubstr("--export-name"));
}

TEST_F(Clients, AnOpenNetworkIsWarnedOf) {
    server_ = std::make_unique<Subprocess>(
        Arguments{QCOW_TOOL, "serve", "-r", "-t", "--bind", "0.0.0.0", "--port", "0", "disk.raw"}, directory_.path());
    server_->wait_for("WARNING");
    server_->wait_for("listening on 0.0.0.0 port ");
    server_->signal(SIGINT);
    EXPECT_EQ(server_->finish().status, 0);
}

}  // namespace
}  // namespace qcow::test
