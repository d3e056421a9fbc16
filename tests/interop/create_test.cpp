// Images that qcow makes, in the eyes of QEMU.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "base/bits.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

class CreateTest : public testing::Test {
protected:
    Finished qcow(Arguments arguments) const {
        arguments.insert(arguments.begin(), QCOW_TOOL);
        return run(arguments, directory_.path());
    }

    void must_qcow(const Arguments& arguments) const {
        const auto finished = qcow(arguments);
        ASSERT_EQ(finished.status, 0) << finished.text();
    }

    void expect_refused(const Arguments& arguments, const std::string& because) const {
        const auto finished = qcow(arguments);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_NE(finished.err.find(because), std::string::npos) << finished.text();
    }

    /// Both checkers find nothing, and QEMU reads the same bytes as are in the raw file.
    void expect_sound_and_equal(const std::string& image, const std::string& raw) const {
        const auto theirs = qemu_img({"check", "-f", "qcow2", image}, directory_.path());
        EXPECT_EQ(theirs.status, 0) << theirs.text();
        const auto ours = qcow({"check", image});
        EXPECT_EQ(ours.status, 0) << ours.text();
        const auto compared = qemu_img({"compare", "-f", "qcow2", "-F", "raw", image, raw}, directory_.path());
        EXPECT_EQ(compared.status, 0) << compared.text();
    }

    /// A raw file with stretches of data, of zeros and of holes, of random place and size.
    std::string make_raw(const std::string& name, std::uint64_t size, Random& random) const {
        const auto path = directory_ / name;
        std::ofstream(path).close();
        std::filesystem::resize_file(path, size);
        std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
        for (int i = 0; i < 12; ++i) {
            const auto at = random.below(size);
            const auto length = std::min(size - at, random.between(1, 300 * KiB));
            file.seekp(static_cast<std::streamoff>(at));
            const auto bytes = random.chance(20) ? std::string(length, '\0') : random.bytes(length);
            file.write(bytes.data(), static_cast<std::streamsize>(length));
        }
        return path;
    }

    TemporaryDirectory directory_;
};

// ---- create: what QEMU finds in the header is what was asked for ----

struct Case {
    std::string name;
    std::string options;
    std::string compress = {};  // further arguments of convert
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::vector<Case> cases() {
    std::vector<Case> result;
    for (const auto* size : {"512", "1k", "4k", "64k", "1M", "2M"}) {
        for (const auto* compat : {"0.10", "1.1"}) {
            const std::string version = compat == std::string("1.1") ? "v3" : "v2";
            const auto options = fmt::format("cluster_size={},compat={}", size, compat);
            result.push_back({fmt::format("{}_{}", version, size), options});
            result.push_back({fmt::format("{}_{}_deflate", version, size), options, "-c"});
        }
        result.push_back(
            {fmt::format("zstd_{}", size), fmt::format("cluster_size={},compression_type=zstd", size), "-c"});
    }
    for (const auto* bits : {"1", "2", "4", "8", "16", "32", "64"}) {
        result.push_back({fmt::format("refcounts_{}", bits), fmt::format("cluster_size=4k,refcount_bits={}", bits)});
        result.push_back(
            {fmt::format("refcounts_{}_deflate", bits), fmt::format("cluster_size=4k,refcount_bits={}", bits), "-c"});
    }
    for (const auto* size : {"16k", "64k", "2M"}) {
        result.push_back({fmt::format("extended_{}", size), fmt::format("cluster_size={},extended_l2=on", size)});
        result.push_back({fmt::format("extended_{}_zstd", size),
                          fmt::format("cluster_size={},extended_l2=on,compression_type=zstd", size), "-c"});
    }
    result.push_back({"lazy", "lazy_refcounts=on"});
    result.push_back({"data_file", "data_file=data.raw"});
    result.push_back({"data_file_raw", "data_file=data.raw,data_file_raw=on"});
    return result;
}

class CreateOptionsTest : public CreateTest, public testing::WithParamInterface<Case> {};

TEST_P(CreateOptionsTest, AnEmptyImageIsWhatQemuMakesOfTheSameOptions) {
    const auto& options = GetParam().options;
    must_qcow({"create", "-o", options, "ours.qcow2", "7M"});
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", options, "theirs.qcow2", "7M"}, directory_.path());
    const auto describe = [&](const std::string& image) {
        auto info = qemu_img_json({"info", "--output=json", image}, directory_.path());
        info.erase("filename");
        info.erase("actual-size");
        return info;
    };
    EXPECT_EQ(describe("ours.qcow2"), describe("theirs.qcow2"));
    EXPECT_EQ(qemu_img({"check", "ours.qcow2"}, directory_.path()).status, 0);
    EXPECT_EQ(qcow({"check", "ours.qcow2"}).status, 0);
}

TEST_P(CreateOptionsTest, QemuReadsWhatWasConvertedAndWritesOn) {
    auto random = Random::named(GetParam().name);
    SCOPED_TRACE(replay_hint());
    const std::uint64_t size = 3 * 1024 * KiB + 512 * random.below(200);
    make_raw("disk.raw", size, random);
    Arguments arguments = {"convert", "-O", "qcow2", "-o", GetParam().options, "disk.raw", "disk.qcow2"};
    if (!GetParam().compress.empty()) arguments.insert(arguments.begin() + 1, GetParam().compress);
    must_qcow(arguments);
    expect_sound_and_equal("disk.qcow2", "disk.raw");

    // Writes, and what they allocate, find the refcounts and tables that they need.
    const std::vector<std::string> writes = {"write -P 7 0 100k", "write -P 8 1M 333k", "discard 2M 256k",
                                             "write -P 9 2500k 64k"};
    must_qemu_io("disk.qcow2", "qcow2", writes, directory_.path());
    EXPECT_EQ(qemu_img({"check", "disk.qcow2"}, directory_.path()).status, 0);
    EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
}

INSTANTIATE_TEST_SUITE_P(Options, CreateOptionsTest, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

TEST_F(CreateTest, PreallocationMapsEverything) {
    for (const auto* how : {"metadata", "falloc", "full"}) {
        const auto image = fmt::format("{}.qcow2", how);
        must_qcow({"create", "-o", fmt::format("preallocation={}", how), image, "20M"});
        const auto check = qemu_img_json({"check", "--output=json", image}, directory_.path());
        EXPECT_EQ(check["allocated-clusters"], 320) << how;
        EXPECT_EQ(check.value("leaks", 0) + check.value("corruptions", 0), 0) << how;
    }
    const auto disk_size = [&](const std::string& image) {
        return qemu_img_json({"info", "--output=json", image}, directory_.path())["actual-size"].get<std::uint64_t>();
    };
    EXPECT_LT(disk_size("metadata.qcow2"), 1024 * KiB);
    EXPECT_GE(disk_size("falloc.qcow2"), 20 * 1024 * KiB);
    EXPECT_GE(disk_size("full.qcow2"), 20 * 1024 * KiB);
}

TEST_F(CreateTest, ATebibyteOfMetadataIsSound) {
    must_qcow({"create", "-q", "-o", "preallocation=metadata", "disk.qcow2", "1T"});
    EXPECT_EQ(qemu_img({"check", "disk.qcow2"}, directory_.path()).status, 0);
    EXPECT_EQ(qcow({"check", "disk.qcow2"}).status, 0);
}

TEST_F(CreateTest, OverlaysTakeTheSizeOfTheirBackingFile) {
    must_qcow({"create", "base.qcow2", "11M"});
    std::filesystem::create_directory(directory_ / "sub");
    must_qcow({"create", "-b", "../base.qcow2", "-F", "qcow2", "sub/top.qcow2"});
    const auto info = qemu_img_json({"info", "--output=json", "sub/top.qcow2"}, directory_.path());
    EXPECT_EQ(info["virtual-size"], 11 * 1024 * KiB);
    EXPECT_EQ(info["backing-filename"], "../base.qcow2");
    EXPECT_EQ(info["backing-filename-format"], "qcow2");
}

TEST_F(CreateTest, RefusesWhatCannotBe) {
    expect_refused({"create", "x.qcow2"}, "SIZE");
    expect_refused({"create", "-o", "cluster_size=3k", "x.qcow2", "1G"}, "cluster_size");
    expect_refused({"create", "-o", "refcount_bits=3", "x.qcow2", "1G"}, "refcount_bits");
    expect_refused({"create", "-o", "compat=0.10,extended_l2=on", "x.qcow2", "1G"}, "extended_l2");
    expect_refused({"create", "-o", "cluster_size=4k,extended_l2=on", "x.qcow2", "1G"}, "16k");
    expect_refused({"create", "-o", "cluster_size=512", "x.qcow2", "1P"}, "L1 table");
    expect_refused({"create", "-o", "nonsense=1", "x.qcow2", "1G"}, "nonsense");
    expect_refused({"create", "-o", "data_file_raw=on", "x.qcow2", "1G"}, "data_file");
    expect_refused({"create", "-b", "absent.qcow2", "-F", "qcow2", "x.qcow2"}, "absent.qcow2");
    expect_refused({"create", "-b", "absent.qcow2", "x.qcow2", "1G"}, "-F");
    expect_refused({"convert", "-O", "qcow2", "-c", "-o", "data_file=d", QCOW_TOOL, "x.qcow2"}, "data file");
    expect_refused({"convert", "-O", "qcow2", "-c", "--level", "10", QCOW_TOOL, "x.qcow2"}, "1 to 9");
    EXPECT_TRUE(directory_.names().empty());
}

TEST_F(CreateTest, DoesNotReplaceAnImageThatIsInUse) {
    must_qcow({"create", "disk.qcow2", "1M"});
    Subprocess holder({"qemu-io", "-f", "qcow2", directory_ / "disk.qcow2"});
    // It answers only once it holds the image.
    holder.write("length\n");
    holder.wait_for(" MiB");
    expect_refused({"create", "disk.qcow2", "2M"}, "another process is using it");
}

// ---- convert ----

TEST_F(CreateTest, TheNumberOfWorkersDoesNotShowInTheResult) {
    Random random(run_seed());
    make_raw("disk.raw", 9 * 1024 * KiB, random);
    for (const Arguments& how : {Arguments{}, {"-c"}, {"-c", "-o", "compression_type=zstd"}, {"-c", "--level", "6"}}) {
        for (const auto* workers : {"1", "2", "7"}) {
            Arguments arguments = {
                "convert", "-O", "qcow2", "-m", workers, "disk.raw", fmt::format("{}.qcow2", workers)};
            arguments.insert(arguments.end(), how.begin(), how.end());
            must_qcow(arguments);
        }
        const auto one = contents(directory_ / "1.qcow2");
        EXPECT_TRUE(contents(directory_ / "2.qcow2") == one);
        EXPECT_TRUE(contents(directory_ / "7.qcow2") == one);
        expect_sound_and_equal("7.qcow2", "disk.raw");
    }
}

TEST_F(CreateTest, OverABackingFileOnlyWhatDiffersIsStored) {
    for (const std::string compat : {"0.10", "1.1"}) {
        auto random = Random::named(compat);
        SCOPED_TRACE(replay_hint());
        make_raw("base.raw", 6 * 1024 * KiB, random);
        {
            // What is to be zeros below is data here.
            std::fstream file(directory_ / "base.raw", std::ios::in | std::ios::out | std::ios::binary);
            file.seekp(0);
            file << random.bytes(256 * KiB);
        }
        std::filesystem::copy_file(directory_ / "base.raw", directory_ / "disk.raw",
                                   std::filesystem::copy_options::overwrite_existing);
        {
            std::fstream file(directory_ / "disk.raw", std::ios::in | std::ios::out | std::ios::binary);
            file.seekp(64 * KiB);
            file << std::string(64 * KiB, '\0') << random.bytes(70 * KiB);
        }
        must_qcow({"convert", "-O", "qcow2", "-o", "compat=" + compat, "-B", "base.raw", "-F", "raw", "disk.raw",
                   "top.qcow2"});
        expect_sound_and_equal("top.qcow2", "disk.raw");
        const auto check = qemu_img_json({"check", "--output=json", "top.qcow2"}, directory_.path());
        EXPECT_LE(check.value("allocated-clusters", 0), 3);
    }
}

TEST_F(CreateTest, ADiskShorterThanItsBackingFileAndZerosOverDataStayWhatTheyAre) {
    Random random(run_seed());
    must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "8M"}, directory_.path());
    must_qemu_io("base.qcow2", "qcow2", {"write -P 1 0 8M"}, directory_.path());
    make_raw("disk.raw", 5 * 1024 * KiB + 512, random);
    must_qcow({"convert", "-O", "qcow2", "-c", "-B", "base.qcow2", "-F", "qcow2", "disk.raw", "top.qcow2"});
    expect_sound_and_equal("top.qcow2", "disk.raw");
}

TEST_F(CreateTest, ChainsAndSnapshotsAreConvertedAsTheyLook) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "4M"}, directory_.path());
    must_qemu_io("base.qcow2", "qcow2", {"write -P 1 0 1M", "write -P 2 3M 100k"}, directory_.path());
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "6M"},
                  directory_.path());
    must_qemu_io("top.qcow2", "qcow2", {"write -P 3 5M 300k", "write -z 200k 300k"}, directory_.path());
    must_qemu_img({"snapshot", "-c", "before", "top.qcow2"}, directory_.path());
    qemu_convert_to_raw("top.qcow2", "qcow2", "before.raw", {}, directory_.path());
    must_qemu_io("top.qcow2", "qcow2", {"write -P 4 0 2M"}, directory_.path());
    qemu_convert_to_raw("top.qcow2", "qcow2", "now.raw", {}, directory_.path());

    must_qcow({"convert", "-O", "qcow2", "top.qcow2", "now.qcow2"});
    must_qcow({"convert", "-O", "qcow2", "-c", "-l", "before", "top.qcow2", "before.qcow2"});
    expect_sound_and_equal("now.qcow2", "now.raw");
    expect_sound_and_equal("before.qcow2", "before.raw");
}

}  // namespace
}  // namespace qcow::test
