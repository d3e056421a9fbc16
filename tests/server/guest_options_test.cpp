// Options of disks of virtual machines that make no sense, and what else the server says.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "server/guest_disk.h"

namespace qcow::test {
namespace {

TEST(GuestOptionsTest, RefusesWhatMeansNothing) {
    const TemporaryDirectory directory;
    must_qemu_img({"create", "-q", "-f", "qcow2", "a.qcow2", "16M"}, directory.path());
    const auto refused = [&](const Arguments& options, const std::string& why) {
        const auto finished = run(joined_arguments({QCOW_TOOL, "serve", "a.qcow2"}, options), directory.path());
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, testing::HasSubstr(why));
        EXPECT_FALSE(std::filesystem::exists(directory / "a"));
    };
    for (const auto& option : std::vector<Arguments>{{"--queues", "2"},
                                                     {"--queue-size", "64"},
                                                     {"--block-size", "4096"},
                                                     {"--poll-us", "10"},
                                                     {"--serial", "one"}})
        refused(joined_arguments(option, {"--socket", "nbd"}), "--vhost-user");
    refused({"--vhost-user", "a", "--serial", "one", "--serial", "two"}, "--serial");
    refused({"--vhost-user", "a", "--vhost-user", "b"}, "a socket of its own");
    refused({"--vhost-user", "fd:three"}, "write ./fd:three for a path");
    refused({"--vhost-user", "fd:77"}, "file descriptor 77");
    refused({"--vhost-user", "a", "--queue-size", "100"}, "a power of two");
    refused({"--vhost-user", "a", "--serial", std::string(21, 'x')}, "a.qcow2: a serial number has at most 20 bytes");
    refused({"--vhost-user", "a", "--export-name", "x"}, "--export-name: it is for NBD clients");
    refused({"--vhost-user", "a", "--connections", "3"}, "--connections: it is for NBD clients");
}

/// The line that the server writes to its log.
std::string said_by(const GuestDisk& disk, const std::string& words) {
    for (int i = 0; i < 10000; ++i) {
        if (auto log = read_file(disk.directory() / "log"); log.contains(words)) return log;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return "nothing";
}

TEST(GuestOptionsTest, SaysThatAnotherFrontEndWaits) {
    const GuestDisk disk;
    front::FrontEnd first(disk.socket());
    first.start();
    const front::Connection second(disk.socket());
    const std::string words = "another front end waits";
    EXPECT_THAT(said_by(disk, words), testing::HasSubstr(words));
}

TEST(GuestOptionsTest, SaysThatMemoryIsNotShared) {
    const GuestDisk disk;
    front::FrontEnd front(disk.socket());
    front.start();
    const std::string words = "does the guest share its memory (share=on)?";
    // One notification alone may be that of the start. Those that come together count as one.
    std::jthread kicks([&](const std::stop_token& stop) {
        while (!stop.stop_requested()) {
            front.queue(0).kick();
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    EXPECT_THAT(said_by(disk, words), testing::HasSubstr(words));
}

}  // namespace
}  // namespace qcow::test
