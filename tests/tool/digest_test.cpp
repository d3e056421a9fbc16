// qcow digest beside a program that computes the digest again, and beside sha256sum.

#include <nlohmann/json.hpp>

#include "support/random.h"
#include "tool/tool_fixture.h"

#ifdef QCOW_HAS_DIGEST
namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class DigestTool : public ToolTest {
protected:
    void SetUp() override {
        auto random = Random::named("qcow digest");
        auto bytes = random.bytes(900 * 1024);
        bytes.replace(300 * 1024, 200 * 1024, 200 * 1024, '\0');
        put_file(file("disk.raw"), bytes);
        std::filesystem::resize_file(file("disk.raw"), 2 * 1024 * 1024 + 3 * 512);
        for (const std::string language : {"python", "bash"})
            put_file(file("recompute." + language), program(language));
    }

    [[nodiscard]] std::string file(const std::string& name) const { return directory_.file(name); }

    /// The program in this language that docs/digest.md has.
    static std::string program(const std::string& language) {
        const auto page = file_bytes(QCOW_DOCUMENTS "/digest.md");
        const auto fence = "```" + language + "\n";
        const auto begin = page.find(fence) + fence.size();
        return page.substr(begin, page.find("```", begin) - begin);
    }

    [[nodiscard]] std::string recomputed(const std::string& name, const std::string& algorithm = "sha256") const {
        return must_run({"python3", "recompute.python", name, algorithm}, directory_.path()).out;
    }

    /// The digest alone, and the end of the line.
    [[nodiscard]] std::string digest(const std::string& name, Arguments options = {}) const {
        options.insert(options.begin(), "digest");
        options.push_back(name);
        const auto out = must_tool(options).out;
        EXPECT_THAT(out, testing::EndsWith("  " + name + "\n"));
        return out.substr(0, out.find(' ')) + "\n";
    }
};

TEST_F(DigestTool, IsWhatTheDocumentSays) {
    EXPECT_EQ(digest("disk.raw"), recomputed("disk.raw"));
    EXPECT_EQ(digest("disk.raw"), must_run({"bash", "recompute.bash", "disk.raw"}, directory_.path()).out);
    for (const std::string algorithm : {"sha1", "sha512", "sha3-256", "blake2b512"}) {
        const std::string theirs = algorithm == "blake2b512" ? "blake2b" : algorithm;
        EXPECT_EQ(digest("disk.raw", {"--algorithm", algorithm}), recomputed("disk.raw", theirs)) << algorithm;
    }
    for (const std::uint64_t size : {0, 511, 65536, 65537, 1000000}) {
        std::filesystem::resize_file(file("disk.raw"), size);
        EXPECT_EQ(digest("disk.raw", {"-f", "raw"}), recomputed("disk.raw")) << size;
    }
}

TEST_F(DigestTool, IsTheSameInEveryImage) {
    const auto expected = recomputed("disk.raw");
    const std::vector<Arguments> kinds = {
        {"-O", "raw", "-S", "0"},
        {"-O", "qcow2"},
        {"-O", "qcow2", "-S", "0"},
        {"-O", "qcow2", "-c"},
        {"-O", "qcow2", "-c", "-o", "compression_type=zstd"},
        {"-O", "qcow2", "-o", "extended_l2=on,cluster_size=64k"},
        {"-O", "qcow2", "-o", "cluster_size=512"},
        {"-O", "qcow2", "-o", "cluster_size=2M"},
        {"-O", "qcow2", "-o", "compat=0.10"},
        {"-O", "qcow2", "-o", "preallocation=metadata"},
        {"-O", "qcow2", "-o", "preallocation=full"},
        {"-O", "qcow2", "-o", "data_file=data"},
        {"-O", "qcow"},
    };
    for (const auto& kind : kinds) {
        auto convert = kind;
        convert.insert(convert.begin(), "convert");
        convert.insert(convert.end(), {"disk.raw", "image"});
        std::filesystem::remove(file("image"));
        must_qemu_img(convert, directory_.path());
        EXPECT_EQ(digest("image"), expected) << testing::PrintToString(kind);
    }
    // An overlay that hides all that its base has.
    must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "4M"}, directory_.path());
    must_qemu_io("base.qcow2", "qcow2", {"write -q -P 66 0 4M"}, directory_.path());
    const auto size = std::to_string(std::filesystem::file_size(file("disk.raw")));
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", size},
                  directory_.path());
    must_qemu_img({"convert", "-n", "-O", "qcow2", "disk.raw", "top.qcow2"}, directory_.path());
    EXPECT_EQ(digest("top.qcow2"), expected);
    must_qemu_img({"snapshot", "-c", "then", "top.qcow2"}, directory_.path());
    must_qemu_io("top.qcow2", "qcow2", {"write -q -P 1 0 512"}, directory_.path());
    EXPECT_NE(digest("top.qcow2"), expected);
    EXPECT_EQ(digest("top.qcow2", {"-l", "then"}), expected);
}

TEST_F(DigestTool, PrintsFacts) {
    must_qemu_img({"convert", "-O", "qcow2", "disk.raw", "disk.qcow2"}, directory_.path());
    const auto facts = json::parse(must_tool({"digest", "--json", "disk.raw", "disk.qcow2"}).out);
    ASSERT_EQ(facts.size(), 2);
    EXPECT_EQ(facts[0]["digest"].get<std::string>() + "\n", recomputed("disk.raw"));
    EXPECT_EQ(facts[1]["digest"], facts[0]["digest"]);
    EXPECT_EQ(facts[1]["filename"], "disk.qcow2");
    EXPECT_EQ(facts[1]["format"], "qcow2");
    EXPECT_EQ(facts[1]["virtual-size"], 2 * 1024 * 1024 + 3 * 512);
    EXPECT_EQ(facts[1]["algorithm"], "sha256");
}

TEST_F(DigestTool, ChecksAsSha256sumDoes) {
    // The same names, for both programs to verify with digests of their own.
    const std::vector<std::string> names = {"disk.raw", "changed.raw", "a\\b\nc", "absent"};
    for (const auto& name : {names[1], names[2]}) std::filesystem::copy_file(file("disk.raw"), file(name));
    const auto make_list = [&](const std::vector<std::string>& program) {
        auto command = program;
        command.insert(command.end(), names.begin(), names.end() - 1);
        auto list = must_run(command, directory_.path()).out;
        const auto absent = list.substr(0, list.find(' ')) + "  absent\n";
        return list + absent;
    };
    put_file(file("theirs"), make_list({"sha256sum"}));
    put_file(file("ours"), make_list({QCOW_TOOL, "digest"}));
    must_qemu_io("changed.raw", "raw", {"write -q -P 1 1M 1"}, directory_.path());

    const auto expect_as_theirs = [&](const Arguments& options) {
        std::vector<std::string> theirs = {"sha256sum"};
        theirs.insert(theirs.end(), options.begin(), options.end());
        theirs.insert(theirs.end(), {"--check", "theirs"});
        Arguments ours = {"digest"};
        ours.insert(ours.end(), options.begin(), options.end());
        ours.insert(ours.end(), {"--check", "ours"});
        const auto expected = run(theirs, directory_.path());
        const auto found = tool(ours);
        EXPECT_EQ(found.status, expected.status) << found.text();
        const auto lines = [](std::string text) {  // of names that both print alike
            const auto begin = text.find("\\a");
            if (begin != std::string::npos) text.erase(begin, text.find('\n', begin) + 1 - begin);
            const auto ours_begin = text.find("a\\b");
            if (ours_begin != std::string::npos) text.erase(ours_begin, text.find('\n', ours_begin) + 1 - ours_begin);
            return text;
        };
        EXPECT_EQ(lines(found.out), lines(expected.out)) << found.text() << expected.text();
        return found;
    };
    auto found = expect_as_theirs({});
    EXPECT_THAT(found.out, AllOf(HasSubstr("disk.raw: OK\n"), HasSubstr("changed.raw: FAILED\n"),
                                 HasSubstr("absent: FAILED open or read\n"), HasSubstr("a\\b\\x0ac: OK\n")));
    EXPECT_THAT(found.err,
                AllOf(HasSubstr("1 listed image could not be read"), HasSubstr("1 computed digest did NOT match")));
    expect_as_theirs({"--quiet"});
    found = expect_as_theirs({"--status"});
    EXPECT_EQ(found.out, "");

    // Only what is right.
    const auto good = tool({"digest", "disk.raw"}).out;
    put_file(file("ours"), "# a comment\n" + good);
    put_file(file("theirs"), must_run({"sha256sum", "disk.raw"}, directory_.path()).out);
    EXPECT_EQ(expect_as_theirs({}).status, 0);
    put_file(file("ours"), "not a digest\n" + good);
    found = tool({"digest", "--check", "ours"});
    EXPECT_EQ(found.status, 0);
    EXPECT_THAT(found.err, HasSubstr("1 line is improperly formatted"));
    for (const auto& bad : Arguments{"", "0123  disk.raw\n", "zz" + good.substr(2)}) {
        put_file(file("ours"), bad);
        expect_refusal({"digest", "--check", "ours"}, HasSubstr("no line with a digest"));
    }
}

TEST_F(DigestTool, Errors) {
    expect_refusal({"digest"}, HasSubstr("IMAGE is missing"));
    expect_refusal({"digest", "absent"}, HasSubstr("absent"));
    expect_refusal({"digest", "--check", "absent"}, HasSubstr("cannot be opened"));
    expect_refusal({"digest", "--check", "ours", "disk.raw"}, HasSubstr("leave out IMAGE"));
    expect_refusal({"digest", "--algorithm", "sha-none", "disk.raw"}, HasSubstr("sha-none"));
    expect_refusal({"digest", "--algorithm", "null", "disk.raw"}, HasSubstr("empty"));
    // The others are not left out.
    const auto partial = tool({"digest", "absent", "-f", "raw", "disk.raw"});
    EXPECT_EQ(partial.status, 1);
    EXPECT_THAT(partial.out, HasSubstr("disk.raw"));
    ToolTest::SetUp();
    corrupt_l2_entry();
    expect_refusal({"digest", "base.qcow2"}, HasSubstr("base.qcow2"));
}

}  // namespace
}  // namespace qcow::test
#endif
