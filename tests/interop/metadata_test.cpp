// What metadata say after a change, and what a check says of them: as QEMU has it.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "base/bits.h"
#include "base/endian.h"
#include "interop/damaged_image.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

class MetadataTest : public testing::Test {
protected:
    [[nodiscard]] Finished qcow(Arguments arguments) const {
        arguments.insert(arguments.begin(), QCOW_TOOL);
        return run(arguments, directory_.path());
    }

    void must_qcow(const Arguments& arguments) const {
        const auto finished = qcow(arguments);
        ASSERT_EQ(finished.status, 0) << finished.text();
    }

    void qemu(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }

    void create(const std::string& name, const std::string& size, const std::string& options = {},
                const std::string& base = {}) const {
        Arguments arguments = {"create", "-q", "-f", "qcow2"};
        if (!options.empty()) arguments.insert(arguments.end(), {"-o", options});
        if (!base.empty()) arguments.insert(arguments.end(), {"-b", base, "-F", "qcow2"});
        arguments.insert(arguments.end(), {name, size});
        qemu(arguments);
    }

    void io(const std::string& name, const std::vector<std::string>& commands,
            const std::string& format = "qcow2") const {
        must_qemu_io(name, format, commands, directory_.path());
    }

    void copy(const std::string& from, const std::string& to) const {
        std::filesystem::copy_file(directory_ / from, directory_ / to,
                                   std::filesystem::copy_options::overwrite_existing);
    }

    void expect_clean(const std::string& name) const {
        const auto theirs = qemu_img({"check", "-f", "qcow2", name}, directory_.path());
        EXPECT_EQ(theirs.status, 0) << theirs.text();
        const auto ours = qcow({"check", name});
        EXPECT_EQ(ours.status, 0) << ours.text();
    }

    /// The map as QEMU sees it, without the places.
    [[nodiscard]] nlohmann::json map(const std::string& name) const {
        auto extents = qemu_img_json({"map", "--output=json", "-f", "qcow2", name}, directory_.path());
        for (auto& extent : extents) extent.erase("offset");
        return extents;
    }

    void expect_equal(const std::string& a, const std::string& b) const {
        const auto compared = qemu_img({"compare", "-f", "qcow2", "-F", "qcow2", a, b}, directory_.path());
        EXPECT_EQ(compared.status, 0) << compared.text();
        EXPECT_EQ(map(a), map(b));
    }

    [[nodiscard]] std::uint64_t length_of(const std::string& name) const {
        return std::filesystem::file_size(directory_ / name);
    }

    void cut(const std::string& name, std::uint64_t length) const {
        std::filesystem::resize_file(directory_ / name, length);
    }

    [[nodiscard]] nlohmann::json check_json(const std::string& name) const {
        return nlohmann::json::parse(qcow({"check", "--json", name}).out);
    }

    TemporaryDirectory directory_;
};

// ---- Zeros ----

TEST_F(MetadataTest, ZerosAreRecordedWhereQemuRecordsThem) {
    create("base.qcow2", "4M");
    io("base.qcow2", {"write -q -P 1 1M 100k"});
    for (const std::string options : {"cluster_size=64k", "cluster_size=4k", "extended_l2=on", "data_file=data"}) {
        for (const std::string base : {"", "base.qcow2"}) {
            auto random = Random::named(options + base);
            SCOPED_TRACE(options + " over \"" + base + "\"; " + replay_hint());
            create("theirs.qcow2", "4M", options, base);
            io("theirs.qcow2", {"write -q -P 2 128k 128k"});
            copy("theirs.qcow2", "ours.qcow2");
            if (options == "data_file=data") {
                copy("data", "other");
                must_qemu_img({"amend", "-f", "qcow2", "-o", "data_file=other", "ours.qcow2"}, directory_.path());
            }
            std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges = {
                {0, 512}, {1 * MiB, 4 * KiB}, {4095 * KiB, 1 * KiB}};
            for (int i = 0; i < 4; ++i) {
                const auto at = random.below(8192) * 512;
                ranges.emplace_back(at, std::min(random.between(1, 600) * 512, 4 * MiB - at));
            }
            for (const auto& [at, length] : ranges) {
                io("theirs.qcow2", {fmt::format("write -q -z -u {} {}", at, length)});
                must_qcow({"zero", "ours.qcow2", std::to_string(at), std::to_string(length)});
                ASSERT_EQ(map("ours.qcow2"), map("theirs.qcow2")) << at << "+" << length;
            }
            expect_equal("ours.qcow2", "theirs.qcow2");
            expect_clean("ours.qcow2");
        }
    }
}

TEST_F(MetadataTest, ZerosOfADiskStayZerosOverAnotherBase) {
    create("base.qcow2", "1M");
    io("base.qcow2", {"write -q -P 1 0 1M"});
    for (const std::string version : {"0.10", "1.1"}) {
        create("disk.qcow2", "1M", "compat=" + version);
        must_qcow({"zero", "disk.qcow2", "0", "64k"});
        must_qcow({"zero", "disk.qcow2", "100k", "1k"});
        qemu({"rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2"});
        const auto read =
            run({"qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0 0 128k", "disk.qcow2"}, directory_.path());
        // Version 2 cannot say it.
        EXPECT_EQ(read.text().find("verification failed") == std::string::npos, version == "1.1") << read.text();
        expect_clean("disk.qcow2");
    }
}

TEST_F(MetadataTest, ConvertingZerosIntoAnImageRecordsThem) {
    create("source.qcow2", "3M");
    io("source.qcow2", {"write -q -P 1 1M 64k"});
    create("theirs.qcow2", "3M");
    io("theirs.qcow2", {"write -q -P 2 0 256k"});
    copy("theirs.qcow2", "ours.qcow2");
    qemu({"convert", "-n", "-O", "qcow2", "source.qcow2", "theirs.qcow2"});
    must_qcow({"convert", "-n", "-O", "qcow2", "source.qcow2", "ours.qcow2"});
    expect_equal("ours.qcow2", "theirs.qcow2");
    expect_clean("ours.qcow2");
}

TEST_F(MetadataTest, WhatADiskGrowsByIsRecordedWhereABaseWouldShow) {
    create("base.qcow2", "2M");
    io("base.qcow2", {"write -q -P 1 0 2M"});
    for (const std::string base : {"", "base.qcow2"}) {
        for (const std::string options : {"cluster_size=64k", "cluster_size=4k", "extended_l2=on"}) {
            for (const auto* from : {"1000k", "2M"}) {
                SCOPED_TRACE(fmt::format("{} over \"{}\" from {}", options, base, from));
                create("theirs.qcow2", from, options, base);
                io("theirs.qcow2", {"write -q -P 2 128k 64k"});
                copy("theirs.qcow2", "ours.qcow2");
                qemu({"resize", "-q", "theirs.qcow2", "40M"});
                must_qcow({"resize", "ours.qcow2", "40M"});
                expect_equal("ours.qcow2", "theirs.qcow2");
                expect_clean("ours.qcow2");
            }
        }
    }
    create("disk.qcow2", "1M");
    must_qcow({"resize", "disk.qcow2", "1T"});
    EXPECT_LT(length_of("disk.qcow2"), 1 * MiB);
}

// ---- Data files ----

TEST_F(MetadataTest, ARawDataFileAndItsImageNeverDiffer) {
    put_file(directory_.file("disk.raw"), std::string(100 * KiB, 'x') + std::string(900 * KiB, '\0'));
    for (const std::string more : {"", ",extended_l2=on", ",preallocation=metadata"}) {
        for (const bool converted : {false, true}) {
            if (converted && more.find("preallocation") != std::string::npos) continue;
            SCOPED_TRACE(more + (converted ? ", converted" : ""));
            std::filesystem::remove(directory_.file("data"));
            const auto options = "data_file=data,data_file_raw=on" + more;
            if (converted) {
                must_qcow({"convert", "-O", "qcow2", "-o", options, "disk.raw", "disk.qcow2"});
            } else {
                must_qcow({"create", "-o", options, "disk.qcow2", "1000k"});
            }
            const auto expect_same = [&](const std::string& after) {
                const auto size = length_of("data");
                io("data", {fmt::format("write -q -P 7 0 {}", size)}, "raw");
                const auto compared =
                    qemu_img({"compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "data"}, directory_.path());
                EXPECT_EQ(compared.status, 0) << after << compared.text();
                const auto read = qcow({"read", "disk.qcow2", "0", std::to_string(size)});
                EXPECT_EQ(read.out, std::string(size, '\7')) << after;
                expect_clean("disk.qcow2");
            };
            expect_same("made");
            must_qcow({"resize", "disk.qcow2", "3M"});
            EXPECT_EQ(length_of("data"), 3 * MiB);
            expect_same("larger");
            must_qcow({"zero", "disk.qcow2", "60k", "200k"});
            must_qcow({"zero", "--keep", "disk.qcow2", "1M", "100k"});
            must_qcow({"discard", "disk.qcow2", "2M", "512k"});
            const auto zeros =
                qemu_img({"compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "data"}, directory_.path());
            EXPECT_EQ(zeros.status, 0) << zeros.text();
            EXPECT_EQ(qcow({"read", "disk.qcow2", "60k", "200k"}).out, std::string(200 * KiB, '\0'));
            expect_same("zeros");
            must_qcow({"resize", "--shrink", "disk.qcow2", "500k"});
            EXPECT_EQ(length_of("data"), 500 * KiB);
            expect_same("smaller");
        }
    }
}

/// What another program left behind the end of a raw data file does not come to light.
TEST_F(MetadataTest, ARawDataFileThatIsLongerThanTheDisk) {
    must_qcow({"create", "-o", "data_file=data,data_file_raw=on", "disk.qcow2", "1M"});
    put_file(directory_.file("data"), std::string(2 * MiB, 'x'));
    expect_clean("disk.qcow2");
    must_qcow({"resize", "disk.qcow2", "3M"});
    EXPECT_EQ(qcow({"read", "disk.qcow2", "1M", "2M"}).out, std::string(2 * MiB, '\0'));
    EXPECT_EQ(file_bytes(directory_ / "data"), std::string(1 * MiB, 'x') + std::string(2 * MiB, '\0'));
}

TEST_F(MetadataTest, ADataFileThatWasCutIsFound) {
    for (const std::string options : {"data_file_raw=off", "data_file_raw=on", "extended_l2=on"}) {
        SCOPED_TRACE(options);
        must_qcow({"create", "-o", "data_file=data," + options, "disk.qcow2", "8M"});
        io("disk.qcow2", {"write -q -P 1 0 4M", "write -q -z 5M 1M", "write -q -P 1 8190k 2k"});
        EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
        const auto whole = length_of("data");
        for (const std::uint64_t length : {whole - 512, 6 * MiB, 3 * MiB + 100, std::uint64_t{0}}) {
            cut("data", length);
            const auto checked = qcow({"check", "disk.qcow2"});
            EXPECT_EQ(checked.status, 2) << checked.text();
            EXPECT_THAT(checked.out, HasSubstr("past the end of the external data file"));
            EXPECT_EQ(qcow({"read", "disk.qcow2", "8190k", "512"}).status, length < whole - 2048 ? 1 : 0);
            const auto converted = qcow({"convert", "disk.qcow2", "disk.raw"});
            EXPECT_EQ(converted.status, 1) << converted.text();
            EXPECT_THAT(converted.err, HasSubstr("past the end of the file"));
            EXPECT_EQ(qcow({"read", "disk.qcow2", "5M", "1M"}).status, 0) << "zeros need no file";
            if (length < 4 * MiB) continue;
            EXPECT_EQ(qcow({"read", "disk.qcow2", "0", "4M"}).out, std::string(4 * MiB, '\1'));
        }
    }
}

TEST_F(MetadataTest, DataFilesThatQemuWritesAreWhole) {
    for (const std::string options :
         {"cluster_size=64k", "extended_l2=on", "data_file_raw=on", "preallocation=metadata"}) {
        auto random = Random::named(options);
        SCOPED_TRACE(options + "; " + replay_hint());
        create("disk.qcow2", "1001k", "data_file=data," + options);
        EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
        for (int i = 0; i < 3; ++i) {
            std::vector<std::string> commands;
            for (int k = 0; k < 3; ++k) {
                const auto at = random.below(1990) * 512;
                commands.push_back(fmt::format("{} {} {}", random.pick({"write -q -P 3", "write -q -z", "discard -q"}),
                                               at, random.between(1, 12) * 512));
            }
            io("disk.qcow2", commands);
            const auto checked = qcow({"check", "disk.qcow2"});
            EXPECT_EQ(checked.status, 0) << checked.text();
            qemu_convert_to_raw("disk.qcow2", "qcow2", "theirs.raw", {}, directory_.path());
            must_qcow({"convert", "disk.qcow2", "ours.raw"});
            EXPECT_TRUE(file_bytes(directory_ / "ours.raw") == file_bytes(directory_ / "theirs.raw"));
        }
        qemu({"resize", "-q", "disk.qcow2", "1333k"});
        EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
        qemu({"resize", "-q", "--shrink", "disk.qcow2", "333k"});
        EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
    }
}

TEST_F(MetadataTest, APreallocatedOverlayShowsItsBackingFile) {
    create("base.qcow2", "1M");
    io("base.qcow2", {"write -q -P 1 0 1M"});
    for (const std::string how : {"metadata", "falloc", "full"}) {
        must_qcow({"create", "-o", "extended_l2=on,preallocation=" + how, "-b", "base.qcow2", "-F", "qcow2",
                   "top.qcow2", "2M"});
        EXPECT_EQ(qcow({"read", "top.qcow2", "0", "2M"}).out, std::string(MiB, '\1') + std::string(MiB, '\0'));
        io("top.qcow2",
           {"read -P 1 0 1M", "read -P 0 1M 1M", "write -q -P 2 1k 1k", "read -P 1 0 1k", "read -P 1 2k 60k"});
        const auto check = qemu_img_json({"check", "--output=json", "top.qcow2"}, directory_.path());
        EXPECT_EQ(check["allocated-clusters"], 32) << how;
        expect_clean("top.qcow2");
    }
    const auto refused =
        qcow({"create", "-o", "preallocation=metadata", "-b", "base.qcow2", "-F", "qcow2", "other.qcow2"});
    EXPECT_EQ(refused.status, 1);
    EXPECT_THAT(refused.err, HasSubstr("extended_l2"));
}

// ---- Shrinking ----

TEST_F(MetadataTest, ASmallerDiskMakesAShorterFile) {
    for (const std::string options :
         {"cluster_size=64k", "cluster_size=4k", "cluster_size=512", "cluster_size=512,refcount_bits=64",
          "cluster_size=16k,extended_l2=on", "cluster_size=4k,refcount_bits=1"}) {
        for (const auto* to : {"3M", "100k"}) {
            SCOPED_TRACE(options + " to " + to);
            create("theirs.qcow2", "24M", options);
            io("theirs.qcow2", {"write -q -P 1 0 12M", "write -q -P 2 20M 1M"});
            copy("theirs.qcow2", "ours.qcow2");
            qemu({"resize", "-q", "--shrink", "theirs.qcow2", to});
            must_qcow({"resize", "--shrink", "ours.qcow2", to});
            EXPECT_LE(length_of("ours.qcow2"), length_of("theirs.qcow2") + 128 * KiB);
            expect_equal("ours.qcow2", "theirs.qcow2");
            expect_clean("ours.qcow2");
            // And on.
            must_qcow({"resize", "ours.qcow2", "30M"});
            io("ours.qcow2", {"read -P 0 3M 27M", "write -q -P 3 25M 2M"});
            must_qcow({"zero", "ours.qcow2", "26M", "1M"});
            io("ours.qcow2", {"read -P 3 25M 1M", "read -P 0 26M 4M"});
            expect_clean("ours.qcow2");
        }
    }
}

TEST_F(MetadataTest, ASmallerDiskKeepsWhatItsSnapshotsHave) {
    create("disk.qcow2", "12M", "cluster_size=4k");
    io("disk.qcow2", {"write -q -P 1 0 6M"});
    qemu({"snapshot", "-c", "then", "disk.qcow2"});
    io("disk.qcow2", {"write -q -P 2 1M 8M"});
    must_qcow({"resize", "--shrink", "disk.qcow2", "2M"});
    expect_clean("disk.qcow2");
    EXPECT_LT(length_of("disk.qcow2"), 9 * MiB);
    must_qcow({"convert", "-l", "then", "disk.qcow2", "then.raw"});
    EXPECT_TRUE(file_bytes(directory_ / "then.raw") == std::string(6 * MiB, '\1') + std::string(6 * MiB, '\0'));
}

// ---- What a check and a map say ----

TEST_F(MetadataTest, AnImageThatWasNotClosedIsNotDamaged) {
    create("disk.qcow2", "16M", "lazy_refcounts=on");
    io("disk.qcow2", {"write -q -P 1 0 1M"});
    qemu({"snapshot", "-c", "then", "disk.qcow2"});
    // Killed with its refcounts in memory.
    run({"qemu-io", "-f", "qcow2", "-c", "write -q -P 2 512k 1M", "-c", "discard -q 0 64k", "-c", "sigraise 9",
         "disk.qcow2"},
        directory_.path());
    const auto checked = qcow({"check", "disk.qcow2"});
    EXPECT_EQ(checked.status, 3) << checked.text();
    EXPECT_THAT(checked.out, HasSubstr("0 corruptions, 0 leaked clusters, 0 errors (not verified), "));
    EXPECT_THAT(checked.out, HasSubstr("was not closed"));
    EXPECT_THAT(checked.out, HasSubstr("qcow check -r all disk.qcow2"));
    const auto json = check_json("disk.qcow2");
    EXPECT_EQ(json.at("dirty"), true);
    EXPECT_EQ(json.at("corruptions"), 0);
    EXPECT_GT(json.at("postponed"), 0);
    EXPECT_EQ(json.at("findings").at(0).at("severity"), "postponed");

    // What the cure leaves is apart: data that lie past the end of the file.
    SoundImage image(file_bytes(directory_ / "disk.qcow2"));
    const auto entry = image.l2_entry(4);
    put_file(directory_.file("damaged.qcow2"), image.with({"", entry, 8, image.number(entry) + (1 << 30)}));
    const auto damaged = qcow({"check", "damaged.qcow2"});
    EXPECT_EQ(damaged.status, 2) << damaged.text();
    EXPECT_THAT(damaged.out, HasSubstr("1 corruptions, 0 leaked clusters"));
    EXPECT_THAT(damaged.out, HasSubstr("cannot be opened for writing"));
    EXPECT_GT(check_json("damaged.qcow2").at("postponed"), 0);

    // And the cure cures.
    must_qcow({"resize", "disk.qcow2", "+0"});
    const auto cured = check_json("disk.qcow2");
    EXPECT_EQ(cured.at("dirty"), false);
    EXPECT_EQ(cured.at("postponed"), 0);
    expect_clean("disk.qcow2");
    io("disk.qcow2", {"read -P 2 512k 1M", "read -P 1 64k 448k"});
}

/// Then nobody can tell what leaks: a repair would free what the snapshot has.
TEST_F(MetadataTest, WhatDamagedTablesHoldIsNoLeak) {
    create("sound.qcow2", "4M", "cluster_size=4k");
    qemu({"bitmap", "--add", "-g", "512", "sound.qcow2", "dirty"});
    io("sound.qcow2", {"write -q -P 1 0 1M"});
    qemu({"snapshot", "-c", "then", "sound.qcow2"});
    io("sound.qcow2", {"write -q -P 2 0 1M"});
    const SoundImage image(file_bytes(directory_ / "sound.qcow2"));
    const auto snapshot = image.snapshots();
    const auto directory = image.bitmap_directory();
    const std::vector<Damage> damages = {
        {"extra length", snapshot + 36, 4, 8},
        {"too many", 60, 4, 2},
        {"L1 table", snapshot, 8, image.number(snapshot) + 512},
        {"entry of the L1 table", image.number(snapshot), 8, image.size() / 4096 * 4096 + 4096},
        {"bitmap directory", directory + 16, 1, 9},
        {"bitmap table", directory, 8, image.number(directory) + 512},
        {"active L2 table", image.l1(), 8, image.number(image.l1()) + 512},
    };
    for (const auto& damage : damages) {
        SCOPED_TRACE(damage.name);
        put_file(directory_.file("damaged.qcow2"), image.with(damage));
        const auto checked = qcow({"check", "damaged.qcow2"});
        EXPECT_EQ(checked.status, 2) << checked.text();
        EXPECT_THAT(checked.out, HasSubstr("could not be counted"));
        const auto json = check_json("damaged.qcow2");
        EXPECT_EQ(json.at("leaks"), 0);
        EXPECT_GT(json.at("check-errors"), 0);
        if (damage.name == "active L2 table") continue;
        const auto converted = qcow({"convert", "damaged.qcow2", "disk.raw"});
        EXPECT_EQ(converted.status, 0) << converted.text();
        EXPECT_TRUE(file_bytes(directory_ / "disk.raw") == std::string(MiB, '\2') + std::string(3 * MiB, '\0'));
    }
}

TEST_F(MetadataTest, AShorterBackingFileHasNothingBehindItsEnd) {
    create("base.qcow2", "1M");
    create("middle.qcow2", "2M", {}, "base.qcow2");
    io("middle.qcow2", {"write -q -P 1 1M 64k"});
    create("top.qcow2", "3M", {}, "middle.qcow2");
    const auto theirs = qemu_img_json({"map", "--output=json", "top.qcow2"}, directory_.path());
    auto ours = nlohmann::json::parse(qcow({"map", "--json", "top.qcow2"}).out);
    for (auto& extent : ours) extent.erase("compressed");
    EXPECT_EQ(ours, theirs);
}

}  // namespace
}  // namespace qcow::test
