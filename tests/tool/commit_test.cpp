// qcow commit, against QEMU: what a disk holds goes into a layer below, and stays what it is.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "qcow/commit.h"
#include "support/effort.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::AnyOf;
using testing::HasSubstr;

/// How the layers of a chain are made.
struct Chain {
    std::string base_format = "qcow2";
    Arguments base_options = {};
    Arguments top_options = {};
    std::string base_size = "4M";
    std::string top_size = "5M";
};

class CommitTest : public ToolTest {
protected:
    void SetUp() override { make_chain({}); }

    void qemu_img(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }
    void qemu_io(const std::string& file, const std::string& format, const Arguments& commands) const {
        must_qemu_io(file, format, commands, directory_.path());
    }

    /// "base", below "middle.qcow2" of 3 MiB, below "top.qcow2". All hold data and zeros where others do, too.
    void make_chain(const Chain& chain) const {
        const auto create = [&](const std::string& format, const Arguments& options, const Arguments& rest) {
            Arguments all = {"create", "-q", "-f", format};
            all.insert(all.end(), options.begin(), options.end());
            all.insert(all.end(), rest.begin(), rest.end());
            qemu_img(all);
        };
        create(chain.base_format, chain.base_options, {"base", chain.base_size});
        const auto base_end = chain.base_size == "1M" ? "write -q -P 2 900k 100k" : "write -q -P 2 3M 900k";
        qemu_io("base", chain.base_format, {"write -q -P 1 0 1M", base_end});
        create("qcow2", {}, {"-b", "base", "-F", chain.base_format, "middle.qcow2", "3M"});
        qemu_io("middle.qcow2", "qcow2", {"write -q -P 3 300k 200k", "write -q -z 600k 100k"});
        create("qcow2", chain.top_options, {"-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", chain.top_size});
        qemu_io("top.qcow2", "qcow2", {"write -q -P 4 400k 300k", "write -q -z 64k 64k", "write -q -P 5 2500k 600k"});
    }

    [[nodiscard]] std::string contents(const std::string& name, const std::string& format = "qcow2") const {
        qemu_img({"convert", "-f", format, "-O", "raw", name, "contents.raw"});
        return bytes_of("contents.raw");
    }
    [[nodiscard]] json info(const std::string& name) const {
        return qemu_img_json({"info", "--output=json", name}, directory_.path());
    }
    [[nodiscard]] json map(const std::string& name) const {
        return json::parse(must_tool({"map", "--json", name}).out);
    }
    /// The bytes that the image stores itself.
    [[nodiscard]] std::uint64_t own_bytes(const std::string& name) const {
        std::uint64_t own = 0;
        for (const auto& extent : map(name)) {
            if (extent["depth"] == 0 && extent["present"] != false) own += extent["length"].get<std::uint64_t>();
        }
        return own;
    }
    void expect_sound(const std::string& name) const {
        qemu_img({"check", "-q", name});
        EXPECT_THAT(must_tool({"check", name}).out, HasSubstr("clean"));
    }
    void expect_warning(const Arguments& arguments, const std::string& about) const {
        const auto done = tool(arguments);
        EXPECT_EQ(done.status, 0);
        EXPECT_THAT(done.err, HasSubstr(about));
    }
    void copy(const std::string& from, const std::string& to) const {
        std::filesystem::copy_file(directory_.file(from), directory_.file(to),
                                   std::filesystem::copy_options::overwrite_existing);
    }

    /// The chain, by other names.
    void keep_chain() const {
        for (const auto* name : {"base", "middle.qcow2", "top.qcow2"}) copy(name, std::string(name) + ".kept");
    }
    void restore_chain() const {
        for (const auto* name : {"base", "middle.qcow2", "top.qcow2"}) copy(std::string(name) + ".kept", name);
    }
    [[nodiscard]] std::array<std::string, 3> all_bytes() const {
        return {bytes_of("base"), bytes_of("middle.qcow2"), bytes_of("top.qcow2")};
    }
};

/// As QEMU does, of which the larger size is that of the images.
TEST_F(CommitTest, IntoEveryKindOfBase) {
    const std::vector<Chain> chains = {
        {"raw"},
        {"raw", {}, {}, "6M"},
        {"raw", {}, {}, "1M"},
        {"qcow2", {"-o", "cluster_size=512"}},
        {"qcow2", {"-o", "cluster_size=2M"}, {"-o", "cluster_size=4k"}},
        {"qcow2", {"-o", "compat=0.10"}, {"-o", "compat=0.10"}, "1M"},
        {"qcow2", {"-o", "extended_l2=on"}, {"-o", "extended_l2=on"}},
        {"qcow2", {"-o", "data_file=base.data"}, {"-o", "data_file=top.data"}},
        {"qcow2", {"-o", "data_file=base.data,data_file_raw=on"}},
        {"qcow2", {"-o", "refcount_bits=1"}, {"-o", "refcount_bits=64"}, "6M"},
        {"qcow2", {"-o", "lazy_refcounts=on"}, {"-o", "lazy_refcounts=on"}, "4M", "3200k"},
    };
    for (const auto& chain : fewer(chains)) {
        SCOPED_TRACE(fmt::format("{} {}", chain.base_format, fmt::join(chain.base_options, " ")));
        make_chain(chain);
        keep_chain();
        const auto before = contents("top.qcow2");
        qemu_img({"commit", "-q", "-b", "base", "top.qcow2"});
        const auto as_qemu = contents("base", chain.base_format);
        restore_chain();
        make_chain(chain);  // data files, too
        for (const bool keep : {true, false}) {
            Arguments commit = {"commit", "-b", "base", "top.qcow2"};
            if (keep) commit.emplace_back("-d");
            const auto top = bytes_of("top.qcow2");
            expect_warning(commit, "middle.qcow2");
            EXPECT_TRUE(contents("top.qcow2") == before);
            EXPECT_TRUE(contents("base", chain.base_format) == as_qemu);
            EXPECT_EQ(bytes_of("top.qcow2") == top, keep);
            expect_sound("top.qcow2");
            if (chain.base_format == "qcow2") expect_sound("base");
        }
        EXPECT_EQ(info("top.qcow2")["backing-filename"], "base");
        EXPECT_EQ(info("top.qcow2")["backing-filename-format"], chain.base_format);
        EXPECT_EQ(own_bytes("top.qcow2"), 0U);
    }
}

TEST_F(CommitTest, IntoTheNextLayerByDefault) {
    const auto before = contents("top.qcow2");
    const auto base = bytes_of("base");
    const auto done = tool({"commit", "top.qcow2"});
    EXPECT_EQ(done.status, 0);
    EXPECT_EQ(done.err, "");
    EXPECT_TRUE(contents("top.qcow2") == before);
    EXPECT_TRUE(contents("middle.qcow2") == before);
    EXPECT_TRUE(bytes_of("base") == base);
    EXPECT_EQ(own_bytes("top.qcow2"), 0U);
    EXPECT_EQ(info("middle.qcow2")["virtual-size"], 5U << 20);
    expect_sound("top.qcow2");
    expect_sound("middle.qcow2");
    // Nothing is left of what was stored.
    EXPECT_LE(std::filesystem::file_size(directory_.file("top.qcow2")), 5U << 16);
    // Once more, there is nothing to do.
    must_tool({"commit", "top.qcow2"});
    EXPECT_TRUE(contents("top.qcow2") == before);
    // And written to again.
    qemu_io("top.qcow2", "qcow2", {"write -q -P 9 1M 100k"});
    expect_sound("top.qcow2");
}

TEST_F(CommitTest, CompressedClustersStayCompressed) {
    qemu_img({"create", "-q", "-f", "qcow2", "base", "4M"});
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top.qcow2", "4M"});
    qemu_io("top.qcow2", "qcow2", {"write -q -c -P 7 1M 256k", "write -q -P 8 2M 64k"});
    const auto before = contents("top.qcow2");
    for (const auto* cluster_size : {"64k", "128k", "512", "2M"}) {
        keep_chain();
        qemu_img({"create", "-q", "-f", "qcow2", "-o", fmt::format("cluster_size={}", cluster_size), "base", "4M"});
        must_tool({"commit", "-d", "top.qcow2"});
        EXPECT_TRUE(contents("base") == before);
        std::uint64_t compressed = 0;
        for (const auto& extent : map("base")) {
            if (extent.value("compressed", false)) compressed += extent["length"].get<std::uint64_t>();
        }
        EXPECT_EQ(compressed, std::string(cluster_size) == "2M" ? 0U : 256U << 10);
        expect_sound("base");
    }
}

TEST_F(CommitTest, HolesStayHoles) {
    qemu_img({"create", "-q", "-f", "qcow2", "base", "1G"});
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top.qcow2", "1G"});
    qemu_io("top.qcow2", "qcow2", {"write -q -z 0 1G"});
    const auto before = std::filesystem::file_size(directory_.file("base"));
    must_tool({"commit", "top.qcow2"});
    EXPECT_EQ(std::filesystem::file_size(directory_.file("base")), before);
    EXPECT_EQ(own_bytes("top.qcow2"), 0U);
}

TEST_F(CommitTest, SnapshotsAndBitmapsStay) {
    qemu_img({"snapshot", "-c", "before", "top.qcow2"});
    const auto snapshot = contents("top.qcow2");
    qemu_img({"bitmap", "--add", "top.qcow2", "kept"});
    qemu_img({"bitmap", "--add", "middle.qcow2", "changes"});
    qemu_io("top.qcow2", "qcow2", {"write -q -P 6 700k 64k"});
    const auto before = contents("top.qcow2");
    expect_warning({"commit", "top.qcow2"}, "internal snapshots (1)");
    EXPECT_TRUE(contents("top.qcow2") == before);
    expect_sound("top.qcow2");
    expect_sound("middle.qcow2");
    const auto dirty = [&](const std::string& image, const std::string& bitmap) {
        const auto opened = value_of(open_image({.location = {.path = directory_.file(image)}}));
        std::uint64_t bytes = 0;
        value_of(opened->each_dirty(bitmap, {0}, opened->size(), [&](const DirtyRun& run) -> Result<void> {
            if (run.dirty) bytes += run.length;
            return {};
        }));
        return bytes;
    };
    EXPECT_EQ(dirty("top.qcow2", "kept"), 128U << 10);  // by QEMU, when it wrote
    EXPECT_GE(dirty("middle.qcow2", "changes"), 900U << 10);
    EXPECT_LT(dirty("middle.qcow2", "changes"), 2U << 20);
    // What the snapshot held itself, it holds.
    must_tool({"snapshot", "-a", "before", "top.qcow2"});
    EXPECT_TRUE(contents("top.qcow2").substr(400 << 10, 300 << 10) == snapshot.substr(400 << 10, 300 << 10));
    expect_sound("top.qcow2");
}

/// It changes, so whoever reads its bitmaps after a crash must not trust them.
TEST_F(CommitTest, BitmapsOfTheBaseAreMarkedMeanwhile) {
    qemu_img({"bitmap", "--add", "middle.qcow2", "changes"});
    const auto flags = [&] {
        const auto shown = qemu_img_json({"info", "-U", "--output=json", "middle.qcow2"}, directory_.path());
        return shown["format-specific"]["data"]["bitmaps"][0]["flags"];
    };
    CommitJob job;
    job.image.location.path = directory_.file("top.qcow2");
    json last;
    value_of(commit(job, {.progress = [&](auto, auto) { last = flags(); }}));
    EXPECT_EQ(last, json::array({"in-use", "auto"}));
    EXPECT_EQ(flags(), json::array({"auto"}));
}

/// The base is found by what its file is, and by the name that the chain has for it.
TEST_F(CommitTest, NamesInOtherDirectories) {
    for (const auto* name : {"bases", "middles", "tops"}) std::filesystem::create_directory(directory_.file(name));
    std::filesystem::rename(directory_.file("base"), directory_.file("bases/base"));
    std::filesystem::rename(directory_.file("middle.qcow2"), directory_.file("middles/middle.qcow2"));
    std::filesystem::rename(directory_.file("top.qcow2"), directory_.file("tops/top.qcow2"));
    qemu_img({"rebase", "-u", "-b", "../bases/base", "-F", "qcow2", "middles/middle.qcow2"});
    qemu_img({"rebase", "-u", "-b", "../middles/middle.qcow2", "-F", "qcow2", "tops/top.qcow2"});
    const auto kept = directory_.path().string() + ".kept";
    std::filesystem::copy(directory_.path(), kept, std::filesystem::copy_options::recursive);
    const auto before = contents("tops/top.qcow2");
    const std::vector<std::pair<std::string, std::string>> names = {
        {"../bases/base", "../bases/base"},
        {"bases/base", "../bases/base"},
        {directory_.file("bases/base"), "../bases/base"},
    };
    for (const auto& [name, recorded] : names) {
        std::filesystem::copy(
            kept, directory_.path(),
            std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
        expect_warning({"commit", "-b", name, "tops/top.qcow2"}, "middle.qcow2");
        EXPECT_EQ(info("tops/top.qcow2")["backing-filename"], recorded);
        EXPECT_TRUE(contents("tops/top.qcow2") == before);
    }
    std::filesystem::remove_all(kept);
}

TEST_F(CommitTest, RefusesWhatCannotBe) {
    const auto before = all_bytes();
    const auto refuses = [&](const Arguments& commit, const auto& message) {
        Arguments arguments = {"commit"};
        arguments.insert(arguments.end(), commit.begin(), commit.end());
        expect_refusal(arguments, message);
        EXPECT_TRUE(all_bytes() == before);
    };
    refuses({"base"}, HasSubstr("no backing file"));
    refuses({"-b", "top.qcow2", "top.qcow2"}, AllOf(HasSubstr("middle.qcow2"), HasSubstr("base")));
    refuses({"-b", "elsewhere", "top.qcow2"}, AllOf(HasSubstr("middle.qcow2"), HasSubstr("base")));
    refuses({R"(json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"backing":null})"},
            HasSubstr("only read"));
    std::filesystem::create_symlink(directory_.file("base"), directory_.file("link"));
    for (const auto* name : {"base", "middle.qcow2"}) {
        const auto file = directory_.file(name);
        if (geteuid() != 0) {
            std::filesystem::permissions(file, std::filesystem::perms::owner_read);
            refuses({"-b", name, "top.qcow2"}, AllOf(HasSubstr("base: "), HasSubstr(name)));
            std::filesystem::permissions(file, std::filesystem::perms::owner_all);
        }
    }
    // A base that somebody reads.
    {
        const auto reader =
            value_of(open_image({.location = {.path = directory_.file("base"), .format = Format::qcow2}}));
        refuses({"-b", "link", "top.qcow2"}, AllOf(HasSubstr("base"), HasSubstr("another process")));
        refuses({"-d", "-b", "base", "top.qcow2"}, HasSubstr("another process"));
    }
    // A raw base that only looks like one.
    qemu_img({"create", "-q", "-f", "raw", "guessed.raw", "4M"});
    must_tool({"create", "-q", "-b", "guessed.raw", "-F", "raw", "over.qcow2"});
    auto bytes = bytes_of("over.qcow2");
    bytes.replace(bytes.find(std::string("\xe2\x79\x2a\xca", 4)), 4, std::string("\x12\x34\x56\x78", 4));
    std::ofstream(directory_.file("over.qcow2"), std::ios::binary) << bytes;
    const auto guessed = tool({"commit", "over.qcow2"});
    EXPECT_EQ(guessed.status, 1);
    EXPECT_THAT(guessed.err, HasSubstr("qcow rebase -u -b guessed.raw -F raw"));
    // One that cannot be written.
    make_encrypted_image("locked.qcow2", "4M", directory_.path());
    must_tool({"rebase", "-u", "-b", "locked.qcow2", "-F", "qcow2", "over.qcow2"});
    expect_refusal({"commit", "over.qcow2"}, HasSubstr("encrypted"));
    qemu_img({"create", "-q", "-f", "qcow", "old.qcow", "4M"});
    must_tool({"rebase", "-u", "-b", "old.qcow", "-F", "qcow", "over.qcow2"});
    expect_refusal({"commit", "over.qcow2"}, HasSubstr("old.qcow"));
    // One that cannot grow.
    qemu_img({"create", "-q", "-f", "qcow2", "-o", "compat=0.10", "short.qcow2", "1M"});
    qemu_img({"snapshot", "-c", "s", "short.qcow2"});
    must_tool({"rebase", "-u", "-b", "short.qcow2", "-F", "qcow2", "over.qcow2"});
    expect_refusal({"commit", "over.qcow2"}, AllOf(HasSubstr("short.qcow2"), HasSubstr("cannot grow")));
}

TEST_F(CommitTest, StaysWithinTheDirectoryOfAnUntrustedImage) {
    std::filesystem::create_directory(directory_.file("inside"));
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "../base", "-F", "qcow2", "inside/top.qcow2", "4M"});
    const auto base = bytes_of("base");
    expect_refusal({"commit", "--untrusted", "-f", "qcow2", "inside/top.qcow2"}, HasSubstr("base"));
    EXPECT_TRUE(bytes_of("base") == base);
    const auto before = contents("top.qcow2");
    expect_warning({"commit", "--untrusted", "-f", "qcow2", "-b", "base", "top.qcow2"}, "middle.qcow2");
    EXPECT_TRUE(contents("base") == before);
}

/// The job is stopped after each piece, and the files are as they would be if the process had died there.
TEST_F(CommitTest, CanBeStoppedAndRunAgain) {
    keep_chain();
    const auto before = contents("top.qcow2");
    for (unsigned pieces = 1;; ++pieces) {
        restore_chain();
        std::stop_source stop;
        CommitJob job;
        job.image.location.path = directory_.file("top.qcow2");
        job.base = "base";
        job.workers = 1;
        unsigned done = 0;
        const auto stopped = commit(job, {.progress =
                                              [&](auto, auto) {
                                                  if (++done == pieces) stop.request_stop();
                                              },
                                          .stop = stop.get_token()});
        EXPECT_TRUE(contents("top.qcow2") == before);
        if (stopped) {
            EXPECT_EQ(stopped->bytes, 5U << 20);
            EXPECT_GT(stopped->copied_bytes, 1U << 20);
            EXPECT_EQ(stopped->warnings.size(), 1U);
            EXPECT_EQ(pieces, 3U);
            break;
        }
        EXPECT_EQ(stopped.error().code, Errc::cancelled);
        EXPECT_EQ(info("top.qcow2")["backing-filename"], "middle.qcow2");
        // Where it died when the base was complete: with another backing file, and then partly emptied.
        value_of(commit(job, {}));
        EXPECT_TRUE(contents("top.qcow2") == before);
        EXPECT_TRUE(contents("base") == before);
        expect_sound("base");
        expect_sound("top.qcow2");
    }
}

/// Wherever the process dies: the disk holds what it held, and the next run completes the work.
TEST_F(CommitTest, CanBeKilledAndRunAgain) {
    Arguments writes;
    for (unsigned i = 1; i <= 200; ++i) writes.push_back(fmt::format("write -q -P {} {}k 20k", i, i * 25));
    qemu_io("top.qcow2", "qcow2", writes);
    keep_chain();
    const auto before = contents("top.qcow2");
    for (unsigned i = 0; i < 12; ++i) {
        restore_chain();
        const std::vector<std::string> commit = {QCOW_TOOL, "commit", "--cache",  "writethrough",
                                                 "-b",      "base",   "top.qcow2"};
        Subprocess killed(commit, directory_.path());
        std::this_thread::sleep_for(std::chrono::milliseconds(4 + 6 * i));
        killed.signal(SIGKILL);
        killed.finish();
        EXPECT_TRUE(contents("top.qcow2") == before);
        EXPECT_THAT(must_run({"qemu-img", "info", "top.qcow2"}, directory_.path()).out, HasSubstr("corrupt: false"));
        EXPECT_EQ(run(commit, directory_.path()).status, 0);
        EXPECT_TRUE(contents("top.qcow2") == before);
        EXPECT_TRUE(contents("base") == before);
        // What was reserved when it died is leaked at worst.
        for (const auto* name : {"base", "top.qcow2"})
            EXPECT_THAT(run({"qemu-img", "check", "-q", name}, directory_.path()).status, AnyOf(0, 3));
    }
}

}  // namespace
}  // namespace qcow::test
