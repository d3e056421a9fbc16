// qcow snapshot and qemu-img snapshot, in turn on the same images.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/bits.h"
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
        for (unsigned step = 0; step < 24; ++step) {
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
    for (const auto* field : {"vm-clock-sec", "vm-clock-nsec", "vm-state-size", "icount"})
        EXPECT_EQ(all[0].value(field, 0), all[1].value(field, 0)) << field;
    EXPECT_EQ(all[1].at("id"), "2");
    EXPECT_EQ(all[1].at("name"), "by-qcow");
    EXPECT_NEAR(all[1].at("date-sec").get<double>(), all[0].at("date-sec").get<double>(), 60);
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
