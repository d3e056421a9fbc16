// qcow compact.

#include <nlohmann/json.hpp>

#include "base/bits.h"
#include "base/endian.h"
#include "format/header.h"
#include "support/bytes.h"
#include "support/result.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class CompactToolTest : public ToolTest {
protected:
    /// A disk of which every second part of 64 KiB was discarded.
    void create(const Arguments& options = {}) {
        Arguments arguments = {"create", "-q", "-f", "qcow2"};
        arguments.insert(arguments.end(), options.begin(), options.end());
        arguments.insert(arguments.end(), {"disk.qcow2", "4M"});
        must_qemu_img(arguments, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 4M", "discard -q 0 1M", "write -q -z 1M 64k"},
                     directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 0 2M 512k"}, directory_.path());
    }

    static json only_json(const Finished& finished) { return json::parse(finished.out); }
};

TEST_F(CompactToolTest, SaysWhatItDoes) {
    create();
    const auto before = bytes_of("disk.qcow2");
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out,
                HasSubstr("qcow compact would make the file at least 1 MiB shorter"));
    EXPECT_THAT(must_tool({"info", "--usage", "disk.qcow2"}).out,
                HasSubstr("qcow compact would make the file at least 1 MiB shorter"));
    EXPECT_EQ(only_json(must_tool({"info", "--usage", "--json", "disk.qcow2"}))["usage"]["compact-bytes"], 1 << 20);
    EXPECT_THAT(must_tool({"compact", "--dry-run", "disk.qcow2"}).out, HasSubstr("would become"));
    EXPECT_EQ(bytes_of("disk.qcow2"), before);
    const auto done = only_json(must_tool({"compact", "--json", "disk.qcow2"}));
    EXPECT_EQ(done["size-before"], before.size());
    EXPECT_EQ(done["size-after"], before.size() - (1 << 20));
    EXPECT_EQ(done["moved-clusters"], 16);
    EXPECT_EQ(done["changed"], true);
    EXPECT_EQ(bytes_of("disk.qcow2").size(), before.size() - (1 << 20));
    EXPECT_THAT(must_tool({"compact", "disk.qcow2"}).out, HasSubstr("nothing to give back"));
    const auto zeroes = only_json(must_tool({"compact", "-m", "1", "--zeroes", "--json", "disk.qcow2"}));
    EXPECT_EQ(zeroes["unmapped-clusters"], 9);
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "3M", "1M"}).out, std::string(1 << 20, '\7'));
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "2M", "512k"}).out, std::string(512 << 10, '\0'));
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

TEST_F(CompactToolTest, Compresses) {
    create();
    const auto planned = only_json(must_tool({"compact", "--compress", "--dry-run", "--json", "disk.qcow2"}));
    EXPECT_THAT(must_tool({"compact", "--compress", "--level", "9", "disk.qcow2"}).out,
                HasSubstr("47 clusters were compressed"));
    EXPECT_EQ(planned["newly-compressed-clusters"], 47);
    EXPECT_LT(bytes_of("disk.qcow2").size(), 1 << 20);
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "3M", "1M"}).out, std::string(1 << 20, '\7'));
    EXPECT_EQ(only_json(must_tool({"compact", "--compress", "--json", "disk.qcow2"}))["changed"], false);
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
    expect_refusal({"compact", "--compress", "--level", "77", "disk.qcow2"}, HasSubstr("level"));
    expect_refusal({"compact", "--level", "1", "disk.qcow2"}, HasSubstr("--compress"));
}

TEST_F(CompactToolTest, AnImageThatIsNotSoundIsRefused) {
    corrupt_l2_entry();
    const auto before = bytes_of("base.qcow2");
    expect_refusal({"compact", "base.qcow2"}, HasSubstr("qcow check -r all"));
    EXPECT_EQ(bytes_of("base.qcow2"), before);
}

/// As writers leave a file whose last cluster is a table: it ends where the table's last word does.
TEST_F(CompactToolTest, AFileMayEndWithinItsLastCluster) {
    put_file(directory_.file("raw"), std::string(48 << 10, '\7') + std::string(976 << 10, '\0'));
    must_tool({"convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "raw", "disk.qcow2"});
    auto bytes = bytes_of("disk.qcow2");
    const auto used = bytes.find_last_not_of('\0') + 1;
    ASSERT_NE(used % 512, 0U);
    bytes.resize(used);
    put_file(directory_.file("disk.qcow2"), bytes);
    EXPECT_TRUE(only_json(must_tool({"check", "--json", "disk.qcow2"}))["missing-bytes"].get<std::uint64_t>() > 0);
    must_tool({"discard", "disk.qcow2", "0", "32k"});
    must_tool({"compact", "disk.qcow2"});
    EXPECT_EQ(only_json(must_tool({"compact", "--json", "disk.qcow2"}))["changed"], false);
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "32k", "16k"}).out, std::string(16 << 10, '\7'));
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

/// Tables behind the end of the disk are left from a disk that was longer, or from an applied snapshot with a VM state.
TEST_F(CompactToolTest, NothingIsKeptBehindTheEndOfTheDisk) {
    must_tool({"create", "-f", "qcow2", "-o", "cluster_size=512", "disk.qcow2", "8G"});
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 1 0 1M"}, directory_.path());
    must_tool({"resize", "--shrink", "disk.qcow2", "2M"});
    must_tool({"compact", "--zeroes", "disk.qcow2"});
    must_tool({"convert", "-O", "qcow2", "-o", "cluster_size=512", "disk.qcow2", "fresh.qcow2"});
    EXPECT_LE(bytes_of("disk.qcow2").size(), bytes_of("fresh.qcow2").size() * 51 / 50);
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());

    must_qemu_img({"create", "-q", "-f", "qcow2", "vm.qcow2", "8M"}, directory_.path());
    // As savevm does: the state lies behind the disk, and the snapshot takes it.
    must_qemu_io("vm.qcow2", "qcow2", {"write -q -P 1 0 1M", "write -q -b -P 7 0 4M"}, directory_.path());
    must_tool({"snapshot", "-c", "vm", "vm.qcow2"});
    must_tool({"compact", "--zeroes", "vm.qcow2"});
    must_tool({"snapshot", "-a", "vm", "vm.qcow2"});
    EXPECT_GT(bytes_of("vm.qcow2").size(), 5U << 20);
    must_qemu_img({"snapshot", "-a", "vm", "vm.qcow2"}, directory_.path());
    must_qemu_io("vm.qcow2", "qcow2", {"read -q -b -P 7 0 4M"}, directory_.path());
    must_tool({"snapshot", "-a", "vm", "vm.qcow2"});
    must_tool({"snapshot", "-d", "vm", "vm.qcow2"});
    EXPECT_THAT(must_tool({"check", "vm.qcow2"}).out, HasSubstr("clean"));
    must_tool({"compact", "vm.qcow2"});
    EXPECT_LT(bytes_of("vm.qcow2").size(), 2U << 20);
    EXPECT_EQ(must_tool({"read", "vm.qcow2", "0", "1M"}).out, std::string(1 << 20, '\1'));
    must_qemu_img({"check", "vm.qcow2"}, directory_.path());
}

TEST_F(CompactToolTest, WhatCannotBeCompacted) {
    create();
    put_file(directory_.file("raw"), std::string(65536, 'x'));
    expect_refusal({"compact", "raw"}, HasSubstr("only qcow2 images can be compacted"));
    expect_refusal({"compact", "-"}, HasSubstr("-"));
    Subprocess other({"qemu-io", "-f", "qcow2", "disk.qcow2"}, directory_.path());
    other.write("write -P 1 0 512\n");
    other.wait_for("wrote");
    expect_refusal({"compact", "disk.qcow2"}, HasSubstr("disk.qcow2"));
}

TEST_F(CompactToolTest, ShowsProgress) {
    create();
    EXPECT_THAT(tool({"compact", "-p", "disk.qcow2"}).err, HasSubstr("compacting: 100%"));
}

/// LUKS encrypts data for their place in the file.
TEST_F(CompactToolTest, EncryptedImages) {
    const Arguments secret = {"--object", "secret,id=s,data=x"};
    const auto image = [](const std::string& name) {
        return "driver=qcow2,encrypt.key-secret=s,file.filename=" + name;
    };
    const auto io = [&](const Arguments& commands) {
        auto all = joined_arguments({"qemu-io", "-d", "unmap"}, secret);
        for (const auto& command : commands) all.insert(all.end(), {"-c", command});
        const auto done = run(joined_arguments(all, {"--image-opts", image("disk.qcow2")}), directory_.path());
        ASSERT_EQ(done.status, 0) << done.text();
    };
    const auto convert = [&](const Arguments& options, const std::string& to) {
        must_qemu_img(joined_arguments(joined_arguments({"convert", "--image-opts"}, secret),
                                       joined_arguments(options, {"-O", "raw", image("disk.qcow2"), to})),
                      directory_.path());
        return bytes_of(to);
    };
    make_encrypted_image("disk.qcow2", "8M", directory_.path());
    io({"write -P 1 0 3M", "write -P 2 3M 3M"});
    must_qemu_img(
        joined_arguments(joined_arguments({"snapshot", "-c", "s", "--image-opts"}, secret), {image("disk.qcow2")}),
        directory_.path());
    io({"write -P 3 1M 1M", "write -P 4 6M 1M", "discard 3M 1M"});
    must_qemu_img(
        joined_arguments(joined_arguments({"snapshot", "-d", "s", "--image-opts"}, secret), {image("disk.qcow2")}),
        directory_.path());
    io({"discard 0 1M"});
    const auto before = convert({}, "before.raw");
    put_file(directory_.file("wrong"), "y");
    expect_refusal({"compact", "--key", "wrong", "disk.qcow2"}, HasSubstr("the key is wrong"));
    expect_refusal({"compact", "--compress", "--object", secret.back(), "disk.qcow2"}, HasSubstr("encrypted"));
    const auto planned = only_json(must_tool({"compact", "--dry-run", "--json", "disk.qcow2"}));
    const auto done = only_json(must_tool({"compact", "--json", "--object", secret.back(), "disk.qcow2"}));
    EXPECT_GT(done["moved-clusters"], 0);
    EXPECT_LT(done["size-after"], done["size-before"]);
    EXPECT_EQ(planned["size-after"], done["size-after"]);
    EXPECT_TRUE(convert({}, "after.raw") == before);
    const auto checked = qemu_check("disk.qcow2", true, directory_.path());
    EXPECT_EQ(checked.status, 0) << checked.text();
}

/// Key slots that lie at the end of the file move, and nothing is left of them at their old place.
TEST_F(CompactToolTest, KeySlotsMove) {
    make_encrypted_image("disk.qcow2", "1M", directory_.path());
    auto bytes = bytes_of("disk.qcow2");
    const auto header = must(format::parse_header(as_bytes(bytes)));
    const auto [at, length] = *header.encryption;
    const auto clusters = (length + 65535) / 65536;
    // They move to the end, and their refcounts with them: all have one block, and there are fewer than 32 clusters.
    const auto end = (bytes.size() + 65535) / 65536 * 65536 + 3 * 65536;
    const auto key_slots = bytes.substr(at.value, length);
    bytes.replace(at.value, length, length, '\0');
    bytes.resize(end + clusters * 65536);
    bytes.replace(end, length, key_slots);
    const auto extension = bytes.find(std::string_view("\x05\x37\xbe\x77", 4));
    Bytes offset(8);
    store_be<std::uint64_t>(offset, 0, end);
    bytes.replace(extension + 8, 8, reinterpret_cast<const char*>(offset.data()), 8);
    put_file(directory_.file("disk.qcow2"), bytes);
    must_tool({"check", "-r", "all", "disk.qcow2"});
    must_tool({"compact", "--object", "secret,id=s,data=x", "disk.qcow2"});
    const auto after = bytes_of("disk.qcow2");
    EXPECT_LT(after.size(), bytes.size());
    const auto found = after.find(key_slots.substr(4096, 4096));
    ASSERT_NE(found, std::string::npos);
    EXPECT_EQ(after.find(key_slots.substr(4096, 4096), found + 1), std::string::npos);
    const auto checked = qemu_check("disk.qcow2", true, directory_.path());
    EXPECT_EQ(checked.status, 0) << checked.text();
    must_tool({"read", "--object", "secret,id=s,data=x", "disk.qcow2", "0", "512"});
}

}  // namespace
}  // namespace qcow::test
