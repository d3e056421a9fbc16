// Options of disks of virtual machines that make no sense.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/qemu.h"
#include "support/temporary_directory.h"

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
    refused({"--vhost-user", "a", "--serial", std::string(21, 'x')}, "20 bytes");
}

}  // namespace
}  // namespace qcow::test
