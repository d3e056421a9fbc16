// qcow snapshot and qemu-img snapshot, in turn on the same images.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/bits.h"
#include "base/endian.h"
#include "support/bytes.h"
#include "support/effort.h"
#include "support/random.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

class SnapshotTest : public ToolTest {
protected:
    void qemu_img(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }

    void snapshot(bool by_qemu, const Arguments& arguments) const {
        auto all = arguments;
        all.insert(all.begin(), "snapshot");
        all.emplace_back("disk.qcow2");
        if (by_qemu) {
            qemu_img(all);
        } else {
            must_tool(all);
        }
    }

    /// Makes an image with this many snapshots, "s1" and so on, which share all data. They are copies of one that QEMU
    /// has made, with an L1 table each. A repair counts what they share.
    void make_with_snapshots(unsigned count) const {
        qemu_img({"create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=32", "disk.qcow2", "32k"});
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 16k"}, directory_.path());
        qemu_img({"snapshot", "-c", "one", "disk.qcow2"});
        auto file = bytes_of("disk.qcow2");
        const auto number = [&](std::size_t at) { return load_be<std::uint64_t>(std::as_bytes(std::span(file)), at); };
        const auto table = number(64);
        const auto entry = file.substr(table, 64);  // with all extra data, without its id and name
        auto l1 = file.substr(number(table), 8);
        l1.resize(512, '\0');
        const auto padded = [](std::string text, std::size_t unit) {
            text.resize(divide_up(text.size(), unit) * unit, '\0');
            return text;
        };
        const auto big_endian = [](std::uint64_t value, std::size_t width) {
            const auto bytes = big_endian_bytes(value, static_cast<unsigned>(width));
            return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        };
        file = padded(std::move(file), 512);
        const auto first_l1 = file.size();
        std::string entries;
        for (unsigned i = 1; i <= count; ++i) {
            const auto id = std::to_string(i);
            auto one = entry;
            one.replace(0, 8, big_endian(first_l1 + (i - 1) * l1.size(), 8));
            one.replace(12, 4, big_endian(id.size(), 2) + big_endian(id.size() + 1, 2));
            entries += padded(one + id + "s" + id, 8);
            file += l1;
        }
        file.replace(60, 12, big_endian(count, 4) + big_endian(file.size(), 8));
        write_file(directory_.file("disk.qcow2"), padded(file + entries, 512));
        EXPECT_EQ(tool({"check", "-r", "all", "disk.qcow2"}).status, 0);
    }

    /// What QEMU reads: the disk, or a snapshot.
    [[nodiscard]] std::string contents(const std::string& snapshot = {}) const {
        Arguments convert = {"convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "contents.raw"};
        if (!snapshot.empty()) convert.insert(convert.end() - 2, {"-l", "snapshot.name=" + snapshot});
        qemu_img(convert);
        return bytes_of("contents.raw");
    }

    void expect_sound() const {
        qemu_img({"check", "-q", "disk.qcow2"});
        EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out, HasSubstr("clean"));
    }
};

TEST_F(SnapshotTest, EachGoesOnFromTheOther) {
    Random random(run_seed());
    for (const auto* options : {"cluster_size=64k", "cluster_size=512", "compat=0.10",
                                "extended_l2=on,cluster_size=16k", "refcount_bits=8", "compression_type=zstd"}) {
        SCOPED_TRACE(options);
        qemu_img({"create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "3M"});
        std::map<std::string, std::string> known;
        for (unsigned step = 0; step < rounds(12); ++step) {
            const bool by_qemu = random.chance(50);
            const auto name =
                known.empty()
                    ? ""
                    : std::next(known.begin(), static_cast<std::ptrdiff_t>(random.below(known.size())))->first;
            SCOPED_TRACE(fmt::format("step {} {} {}", step, by_qemu ? "QEMU" : "qcow", name));
            const auto dice = random.below(8);
            if (dice < 3) {
                const auto at = random.below(5000) * 512;
                must_qemu_io("disk.qcow2", "qcow2",
                             {fmt::format("write -q {} {} {}",
                                          random.chance(20) ? "-z" : fmt::format("-P {}", random.between(1, 255)), at,
                                          std::min<std::uint64_t>(random.between(1, 400) * 512, 3 * MiB - at))},
                             directory_.path());
            } else if (dice < 5 || known.empty()) {
                const auto made = fmt::format("made-{}", step);
                snapshot(by_qemu, {"-c", made});
                known[made] = contents();
            } else if (dice == 5) {
                snapshot(by_qemu, {"-a", name});
                EXPECT_EQ(contents(), known.at(name));
            } else if (dice == 6) {
                snapshot(by_qemu, {"-d", name});
                known.erase(name);
            } else {
                snapshot(false, {"--rename", name, name + "'"});
                known[name + "'"] = known.at(name);
                known.erase(name);
            }
            expect_sound();
            for (const auto& [one, bytes] : known) EXPECT_TRUE(contents(one) == bytes) << one;
            if (HasFailure()) return;
        }
        std::filesystem::remove(directory_.file("disk.qcow2"));
    }
}

TEST_F(SnapshotTest, WhatIsWrittenIsWhatQemuWrites) {
    qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"});
    snapshot(true, {"-c", "by-qemu"});
    snapshot(false, {"-c", "by-qcow"});
    const auto all = qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path()).at("snapshots");
    ASSERT_EQ(all.size(), 2U);
    for (const auto* field : {"vm-clock-sec", "vm-clock-nsec", "vm-state-size"})
        EXPECT_EQ(all[0].at(field), all[1].at(field)) << field;
    EXPECT_EQ(all[1].at("id"), "2");
    EXPECT_EQ(all[1].at("name"), "by-qcow");
    EXPECT_NEAR(all[1].at("date-sec").get<double>(), all[0].at("date-sec").get<double>(), 60);
}

/// QEMU counts instructions only if it is told to. Where it did not, all bits of the count are set.
TEST_F(SnapshotTest, AnInstructionCountOrNone) {
    qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"});
    snapshot(true, {"-c", "counted"});  // qemu-img records 0
    snapshot(false, {"-c", "not"});
    const auto expect_kept = [&](const std::string& first, const std::string& second) {
        const auto theirs = qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path()).at("snapshots");
        const auto ours = nlohmann::json::parse(must_tool({"snapshot", "-l", "--json", "disk.qcow2"}).out);
        for (const auto& all : {theirs, ours}) {
            EXPECT_EQ(all.at(0).at("icount"), 0);
            EXPECT_FALSE(all.at(1).contains("icount"));
        }
        EXPECT_THAT(
            must_tool({"snapshot", "-l", "disk.qcow2"}).out,
            testing::ContainsRegex("ICOUNT(.|\n)*" + first + " .* 0  +1 MiB\n(.|\n)*" + second + " .* --  +1 MiB\n"));
    };
    expect_kept("counted", "not");
    snapshot(false, {"--rename", "counted", "a"});
    snapshot(false, {"--rename", "not", "b"});
    snapshot(false, {"-a", "b"});
    must_tool({"amend", "-o", "compat=0.10", "disk.qcow2"});
    must_tool({"amend", "-o", "compat=1.1", "disk.qcow2"});
    must_tool({"compact", "disk.qcow2"});
    expect_kept("a", "b");
}

TEST_F(SnapshotTest, IdsThatAreNamesOfOthers) {
    qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"});
    for (const auto* name : {"x", "1", "twice", "twice"}) snapshot(false, {"-c", name});
    snapshot(false, {"--rename", "x", "2"});  // id 1 is called 2, and id 2 is called 1
    for (const auto* name : {"1", "2", "twice"}) {
        expect_refusal({"snapshot", "-d", name, "disk.qcow2"},
                       testing::AllOf(HasSubstr("not clear"), HasSubstr("snapshot.id=ID")));
    }
    const auto names = [&] {
        std::set<std::string> found;
        const auto info = qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path());
        for (const auto& one : info.at("snapshots"))
            found.insert(one.at("id").get<std::string>() + ":" + one.at("name").get<std::string>());
        return found;
    };
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 9 0 64k"}, directory_.path());
    snapshot(false, {"-c", "nine"});
    snapshot(false, {"--rename", "nine", "3"});  // and id 3 is called twice
    EXPECT_EQ(must_tool({"digest", "-l", "snapshot.id=3", "disk.qcow2"}).out.substr(0, 64),
              must_tool({"digest", "-l", "3", "disk.qcow2"}).out.substr(0, 64));
    EXPECT_EQ(must_tool({"digest", "-l", "snapshot.name=3", "disk.qcow2"}).out.substr(0, 64),
              must_tool({"digest", "disk.qcow2"}).out.substr(0, 64));
    snapshot(false, {"-d", "snapshot.name=3"});
    snapshot(false, {"-a", "snapshot.id=2"});
    snapshot(false, {"-d", "snapshot.name=1"});
    EXPECT_EQ(names(), (std::set<std::string>{"1:2", "3:twice", "4:twice"}));
    snapshot(false, {"-d", "snapshot.id=4"});
    snapshot(false, {"--rename", "snapshot.id=1", "y"});
    EXPECT_EQ(names(), (std::set<std::string>{"1:y", "3:twice"}));
}

TEST_F(SnapshotTest, Refusals) {
    qemu_img({"create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "with-data.qcow2", "1M"});
    expect_refusal({"snapshot", "-c", "x", "with-data.qcow2"}, HasSubstr("overlay"));
    qemu_img({"create", "-q", "-f", "raw", "disk.raw", "1M"});
    expect_refusal({"snapshot", "-c", "x", "-f", "raw", "disk.raw"}, HasSubstr("no internal snapshots"));
    qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"});
    expect_refusal({"snapshot", "-d", "none", "disk.qcow2"}, HasSubstr("none"));
    expect_refusal({"snapshot", "-c", "x", "--force-share", "disk.qcow2"}, HasSubstr("--force-share"));
    EXPECT_NE(tool({"snapshot", "-c", "x", "-d", "y", "disk.qcow2"}).status, 0);
}

/// The most that QEMU accepts.
TEST_F(SnapshotTest, AsManyAsThereMayBe) {
    make_with_snapshots(65536);
    EXPECT_THAT(must_tool({"snapshot", "-l", "disk.qcow2"}).out, HasSubstr("s65536"));
    expect_refusal({"snapshot", "-c", "more", "disk.qcow2"},
                   testing::AllOf(HasSubstr("at most 65536 entries"), HasSubstr("remove snapshots first")));
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out, HasSubstr("clean"));
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 8 0 16k"}, directory_.path());
    must_tool({"snapshot", "-a", "s40000", "disk.qcow2"});
    EXPECT_EQ(contents(), std::string(16 << 10, '\7') + std::string(16 << 10, '\0'));
    must_tool({"snapshot", "-d", "s30000", "disk.qcow2"});
    must_tool({"snapshot", "-c", "last", "disk.qcow2"});
    EXPECT_EQ(must_tool({"digest", "-l", "last", "disk.qcow2"}).out.substr(0, 64),
              must_tool({"digest", "-l", "s1", "disk.qcow2"}).out.substr(0, 64));
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out, HasSubstr("clean"));
    if (effort() > 1) expect_sound();  // QEMU takes seconds for it
}

/// Killed at each of its flushes: the disk is whole, and the image can be written. Version 3 says that this corrects
/// what is left behind. Version 2 has no mark for that, so a check finds wrong COPIED flags, which do no harm.
TEST_F(SnapshotTest, AKillLeavesNothingThatHarms) {
    for (const auto& [compat, action] : {std::pair("1.1", "-c"), {"1.1", "-d"}, {"0.10", "-c"}}) {
        std::filesystem::remove(directory_.file("disk.qcow2"));
        qemu_img({"create", "-q", "-f", "qcow2", "-o", fmt::format("compat={},cluster_size=4k", compat), "disk.qcow2",
                  "1M"});
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 256k"}, directory_.path());
        qemu_img({"snapshot", "-c", "old", "disk.qcow2"});
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 8 0 128k"}, directory_.path());
        if (std::string(compat) == "1.1") qemu_img({"bitmap", "--add", "disk.qcow2", "b"});
        const auto image = bytes_of("disk.qcow2");
        const auto disk = contents();
        unsigned kills = 0;
        for (;; ++kills) {
            SCOPED_TRACE(fmt::format("{} {} killed at flush {}", compat, action, kills + 1));
            write_file(directory_.file("disk.qcow2"), image);
            const auto done = run({"env", "ASAN_OPTIONS=detect_leaks=0", "strace", "-f", "-o", "/dev/null", "-e",
                                   fmt::format("inject=fdatasync:signal=KILL:when={}", kills + 1), QCOW_TOOL,
                                   "snapshot", action, "old", "disk.qcow2"},
                                  directory_.path());
            if (done.status == 0) break;
            EXPECT_TRUE(contents() == disk);
            // The disk did not change, so what was recorded of it stays true.
            EXPECT_THAT(must_tool({"info", "disk.qcow2"}).out, testing::Not(HasSubstr("in use")));
            const auto left = bytes_of("disk.qcow2");
            const auto checked = tool({"check", "disk.qcow2"}).status;
            must_tool({"zero", "disk.qcow2", "0", "4k"});
            const auto checked_again = tool({"check", "disk.qcow2"}).status;
            const bool marked = std::string(compat) == "1.1";
            EXPECT_THAT(std::pair(checked, checked_again),
                        testing::Conditional(marked, testing::Pair(testing::AnyOf(0, 3), testing::AnyOf(0, 3)),
                                             testing::Pair(testing::AnyOf(0, 2, 3), testing::AnyOf(0, 2, 3))));
            write_file(directory_.file("disk.qcow2"), left);
            must_tool({"check", "-r", "all", "disk.qcow2"});
            expect_sound();
            EXPECT_TRUE(contents() == disk);
            if (HasFailure()) return;
        }
        EXPECT_GE(kills, 3U);
    }
}

TEST_F(SnapshotTest, AFileMayEndWithoutPadding) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "padded.qcow2", "1M"}, directory_.path());
    must_qemu_img({"snapshot", "-c", "s0", "padded.qcow2"}, directory_.path());
    EXPECT_NE(bytes_of("padded.qcow2").size() % 8, 0U);
    EXPECT_THAT(must_tool({"check", "padded.qcow2"}).out, testing::Not(HasSubstr("cut")));
    must_tool({"compact", "padded.qcow2"});
    must_qemu_img({"snapshot", "-a", "s0", "padded.qcow2"}, directory_.path());
}

}  // namespace
}  // namespace qcow::test
