// What the command line says of itself, and what it takes as QEMU's does: sizes, options, names, near misses.

#include <nlohmann/json.hpp>
#include <sstream>

#include "support/effort.h"
#include "tool/qemu_words.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class WordsTest : public ToolTest {
protected:
    void SetUp() override {
        must_qemu_img({"create", "-q", "-f", "qcow2", "a.qcow2", "1M"}, directory_.path());
        must_qemu_img({"create", "-q", "-f", "qcow2", "b.qcow2", "2M"}, directory_.path());
        must_qemu_img({"create", "-q", "-f", "raw", "disk.raw", "1M"}, directory_.path());
    }

    /// What stands between bars.
    static std::vector<std::string> texts(const std::string& joined) {
        std::vector<std::string> result;
        std::istringstream rest(joined);
        for (std::string text; std::getline(rest, text, '|');) result.push_back(text);
        return fewer(std::move(result));
    }

    /// What the image that was made is like, or that none was. Sizes are compared in sectors, of which QEMU makes
    /// disks.
    [[nodiscard]] std::string result(const Finished& made) const {
        if (made.status != 0) return "refused";
        const auto info =
            json::parse(must_qemu_img({"info", "--output=json", "-f", "qcow2", "new"}, directory_.path()).out);
        const std::uint64_t size = json::parse(must_tool({"info", "--json", "new"}).out)["virtual-size"];
        return json{{"size", (size + 511) / 512},
                    {"cluster-size", info["cluster-size"]},
                    {"backing", info.value("backing-filename", "")},
                    {"data", info["format-specific"]["data"]}}
            .dump();
    }

    void expect_as_qemu(const Arguments& options, const Arguments& size) const {
        const auto arguments = [&](Arguments all) {
            for (const auto& option : options) all.push_back(option);
            all.emplace_back("new");
            for (const auto& text : size) all.push_back(text);
            return all;
        };
        const auto theirs = result(qemu_img(arguments({"create", "-q", "-f", "qcow2"}), directory_.path()));
        for (const auto* made : {"new", "a,b"}) std::filesystem::remove(directory_.file(made));
        const auto ours = tool(arguments({"create", "-q"}));
        EXPECT_EQ(result(ours), theirs) << ours.text();
        std::filesystem::remove(directory_.file("new"));
    }
};

TEST_F(WordsTest, SizesAsQemuTakesThem) {
    for (const auto& text : texts(
             "0|1|1024|1024.0|1024.|1024.5|.5k|0.5k|1.5K|+1k|+1|++1k|+-1k|1kb|1KiB|1b|1.0B|1.5b|1k |1 k| 1k|\t1k|0x400|"
             "0X400|0x400k|0x400b|0x4.8|0x1M|0x1e|010|08|1e3|1e3k|1E|7.9999E|8E|0.0001k|0.001k|0.0005k|1.1.1k|1..5k|"
             "1.23456T|0.1G|0.3M|1.00048828125k|1.0004k|1t|1P|1g|1m|1,5k|abc||k|.|.k|+|0x|0xg|1k1|1kk|inf|nan|1e1|0.k|"
             "00.5k|+0x400|0x1p10|1y|1ki|2k\n|1.5|18446744073709551615|18446744073709551616|9223372036854775808|"
             "1.0000000000000000001G")) {
        SCOPED_TRACE(text);
        expect_as_qemu({}, {text});
    }
    expect_as_qemu({"-o", "size=0"}, {});
    expect_as_qemu({"-o", "size=+1.5k"}, {});
    // All of a kilobyte but a hair.
    must_tool({"create", "-q", "new", "1.999999999999999999k"});
    EXPECT_THAT(must_tool({"info", "new"}).out, HasSubstr("2048"));
    expect_refusal({"create", "new2", "9E"}, HasSubstr("too large"));
    for (const auto& [size, bytes] :
         {std::pair("+1k", 1049600), {"++1k", 1049600}, {"+1024.0", 1049600}, {"-1k", 1047552}}) {
        must_qemu_img({"create", "-q", "-f", "qcow2", "new", "1M"}, directory_.path());
        must_tool({"resize", "--shrink", "new", size});
        EXPECT_EQ(json::parse(must_tool({"info", "--json", "new"}).out)["virtual-size"], bytes) << size;
    }
}

TEST_F(WordsTest, OptionsAsQemuTakesThem) {
    for (const auto& text : texts(
             "lazy_refcounts|lazy_refcounts=yes|lazy_refcounts=true|lazy_refcounts=y|lazy_refcounts=n|lazy_refcounts=1|"
             "lazy_refcounts=ON|lazy_refcounts=|lazy_refcounts=on,lazy_refcounts=off||,|compat=v3,|,compat=v2|compat="
             "v2,,|"
             "compat=2|compat=0.10|data_file=a,,b|data_file=|cluster_size=4k,cluster_size=+8k|cluster_size|"
             "cluster_size=0|refcount_bits=0x8|refcount_bits= 8|refcount_bits=1k|refcount_bits=3|refcount_bits=64|"
             "backing_file=|backing_fmt=qcow2|backing_fmt=|size=10M|size=0|size=|foo=1|=1|Cluster_size=4k|"
             "preallocation=meta|compat =v2")) {
        SCOPED_TRACE(text);
        expect_as_qemu({"-o", text}, {"20M"});
    }
    expect_as_qemu({"-b", ""}, {"1M"});
    expect_as_qemu({"-b", "", "-F", "qcow2"}, {"1M"});
    expect_as_qemu({"-F", "qcow2"}, {"1M"});
    expect_as_qemu({"-b", "a.qcow2", "-F", ""}, {});
    expect_as_qemu({"-b", "a.qcow2", "-F", "qcow2", "-o", "backing_file=b.qcow2,backing_fmt=raw"}, {});
    // What is said again has its last value.
    expect_as_qemu({"-b", "a.qcow2", "-b", "b.qcow2", "-F", "raw", "-F", "qcow2"}, {});
    expect_as_qemu({"-o", "lazy_refcounts=on", "-o", "lazy_refcounts=off", "-o", "size=1M", "-o", "size=2M"}, {});
    EXPECT_THAT(must_tool({"create", "-o", "cluster_size=4k,help"}).out, HasSubstr("lazy_refcounts"));
    EXPECT_THAT(must_tool({"convert", "-o", "?"}).out, HasSubstr("Usage: qcow convert"));
}

TEST_F(WordsTest, WhatOnlyQemuHas) {
    const auto each = [](const ::tool::QemuWord& entry, const auto& visit) {
        std::istringstream words{std::string(entry.words)};
        for (std::string word; words >> word;) visit(word);
    };
    for (const auto& entry : tool::qemu_commands()) {
        each(entry, [&](auto& word) { expect_refusal({word, "-x", "y"}, HasSubstr(std::string(entry.instead))); });
    }
    for (const auto& entry : tool::qemu_options()) {
        each(entry, [&](auto& word) {
            const std::string command = entry.command.empty() ? "info" : std::string(entry.command);
            const auto refused = tool(command == "-o" ? Arguments{"create", "-o", word + "=on", "new", "1M"}
                                                      : Arguments{command, word, "1", "a.qcow2"});
            EXPECT_EQ(refused.status, command == "compare" ? 2 : 1);
            EXPECT_THAT(refused.err, HasSubstr(std::string(entry.instead)));
        });
    }
    for (const auto& entry : tool::qemu_values()) {
        each(entry, [&](auto& word) {
            expect_refusal(word == "directsync" ? Arguments{"zero", "--cache", word, "a.qcow2", "0", "1"}
                                                : Arguments{"convert", "-O", word, "a.qcow2", "new"},
                           HasSubstr(std::string(entry.instead)));
        });
    }
    // However they are spelled.
    expect_refusal({"info", "--trace=x", "a.qcow2"}, AllOf(HasSubstr("--trace"), HasSubstr("leave it out")));
    expect_refusal({"convert", "-cW", "a.qcow2", "new"}, HasSubstr("-W"));
    expect_refusal({"convert", "-r1", "a.qcow2", "new"}, HasSubstr("-r is an option of QEMU"));
    expect_refusal({"--object", "secret,id=s", "info", "a.qcow2"}, HasSubstr("--object"));
    EXPECT_EQ(files(), (std::set<std::string>{"a.qcow2", "b.qcow2", "disk.raw"}));
}

/// Whether `ours` has all that `theirs` has: objects may have more members.
bool has_all(const json& ours, const json& theirs) {
    if (theirs.is_object()) {
        return std::ranges::all_of(theirs.items(), [&](const auto& member) {
            return ours.contains(member.key()) && has_all(ours[member.key()], member.value());
        });
    }
    return theirs.is_array() ? std::ranges::equal(ours, theirs, has_all) : ours == theirs;
}

/// Whoever reads the JSON of qemu-img finds the same in ours.
TEST_F(WordsTest, OutputsAreThoseOfQemu) {
    for (const auto* const verb : {"info", "check", "map"}) {
        SCOPED_TRACE(verb);
        const auto theirs = json::parse(must_qemu_img({verb, "--output=json", "a.qcow2"}, directory_.path()).out);
        const auto ours = json::parse(must_tool({verb, "--output=json", "a.qcow2"}).out);
        EXPECT_EQ(json::parse(must_tool({verb, "--json", "a.qcow2"}).out), ours);
        EXPECT_TRUE(has_all(ours, theirs)) << ours << "\n" << theirs;
        EXPECT_THAT(must_tool({verb, "--output", "human", "a.qcow2"}).out, testing::Not(HasSubstr("{")));
    }
}

TEST_F(WordsTest, NearMisses) {
    const auto meant = [](const std::string& word) { return HasSubstr("did you mean \"" + word + "\"?"); };
    for (const auto& [said, word] : {std::pair("infos", "info"),
                                     {"chekc", "check"},
                                     {"conv", "convert"},
                                     {"Map", "map"},
                                     {"snaphot", "snapshot"},
                                     {"resise", "resize"}})
        expect_refusal({said, "a.qcow2"}, meant(word));
    for (const auto& [said, word] : {std::pair("--jsn", "--json"),
                                     {"--JSON", "--json"},
                                     {"-json", "--json"},
                                     {"--backing-chian", "--backing-chain"},
                                     {"--fromat=raw", "--format"},
                                     {"-u", "-U"}})
        expect_refusal({"info", said, "a.qcow2"}, AllOf(meant(word), HasSubstr("qcow info --help")));
    for (const auto& [said, word] : {std::pair("cluster_siz=4k", "cluster_size"),
                                     {"cluster-size=4k", "cluster_size"},
                                     {"lazy", "lazy_refcounts"},
                                     {"backing_format=raw", "backing_fmt"},
                                     {"preallocation=metdata", "metadata"},
                                     {"compression_type=ZSTD", "zstd"},
                                     {"extended_l2=onn", "on"}})
        expect_refusal({"create", "-o", said, "new", "1M"}, meant(word));
    expect_refusal({"info", "-f", "qocw2", "a.qcow2"}, meant("qcow2"));
    expect_refusal({"create", "-b", "a.qcow2", "-F", "QCOW2", "new"}, meant("qcow2"));
    expect_refusal({"zero", "--cache", "writebck", "a.qcow2", "0", "1"}, meant("writeback"));
    // What is like nothing.
    expect_refusal({"frobnicate"}, Not(HasSubstr("did you mean")));
    expect_refusal({"info", "--frobnicate", "a.qcow2"}, Not(HasSubstr("did you mean")));
    expect_refusal({std::string(100'000, 'i')}, Not(HasSubstr("did you mean")));
    expect_refusal({"-f", "raw", "info", "disk.raw"}, HasSubstr("after the command"));
    expect_refusal({"a.qcow2"}, HasSubstr("a file goes after its command"));
    EXPECT_EQ(files(), (std::set<std::string>{"a.qcow2", "b.qcow2", "disk.raw"}));
}

TEST_F(WordsTest, WhatIsMissingOrTooMuch) {
    expect_refusal({"info"}, HasSubstr("IMAGE is missing; usage: qcow info [OPTIONS] IMAGE"));
    expect_refusal({"read", "a.qcow2", "0"}, HasSubstr("LENGTH is missing; usage: qcow read"));
    expect_refusal({"convert", "a.qcow2"}, HasSubstr("TARGET is missing; usage: qcow convert"));
    expect_refusal({"info", "a.qcow2", "b.qcow2"}, HasSubstr("\"b.qcow2\" is one argument too many; usage: qcow info"));
    expect_refusal({"convert", "a.qcow2", "new", "-O"}, HasSubstr("--target-format needs a value: {raw,qcow2,luks}"));
    expect_refusal({"convert", "-O", "qcow2", "--level", "3", "a.qcow2", "new"}, HasSubstr("--compress"));
    expect_refusal({"write", "a.qcow2", "2M"}, HasSubstr("offset 2097152 lies past the end of the disk"));
    expect_refusal({"serve", "--port", "70000", "a.qcow2"},
                   HasSubstr("\"70000\" is not a whole number from 0 to 65535"));
    expect_refusal({"info", "--json=maybe", "a.qcow2"}, HasSubstr("--json"));
    EXPECT_THAT(must_tool({"snapshot", "a.qcow2"}).out, HasSubstr("no internal snapshots"));
}

TEST_F(WordsTest, EmptyNames) {
    must_qemu_img({"snapshot", "-c", "", "a.qcow2"}, directory_.path());
    for (const Arguments& arguments :
         std::initializer_list<Arguments>{{"info", ""},
                                          {"write", "", "0"},
                                          {"serve", ""},
                                          {"create", "", "1M"},
                                          {"convert", "", "new"},
                                          {"convert", "a.qcow2", ""},
                                          {"convert", "-n", "a.qcow2", ""},
                                          {"convert", "-l", "", "a.qcow2", "new"},
                                          {"read", "-l", "", "a.qcow2", "0", "1"},
                                          {"map", "-l", "", "a.qcow2"},
                                          {"serve", "-l", "", "a.qcow2"},
                                          {"serve", "-B", "", "a.qcow2"},
                                          {"serve", "-k", "", "a.qcow2"},
                                          {"serve", "-b", "", "a.qcow2"},
                                          {"serve", "--pid-file", "", "a.qcow2"},
                                          {"serve", "--tls-psk", "", "a.qcow2"},
                                          {"serve", "--tls-certificates", "", "a.qcow2"},
                                          {"convert", "-O", "qcow2", "-B", "", "-F", "raw", "a.qcow2", "new"}})
        expect_refusal(arguments, HasSubstr("the name is empty"));
    EXPECT_EQ(files(), (std::set<std::string>{"a.qcow2", "b.qcow2", "disk.raw"}));
}

TEST_F(WordsTest, AGuessedFormatIsWarnedOfWhereItIsWrittenTo) {
    for (const Arguments& arguments : std::initializer_list<Arguments>{{"write", "disk.raw", "0"},
                                                                       {"zero", "disk.raw", "0", "512"},
                                                                       {"discard", "disk.raw", "0", "4k"},
                                                                       {"resize", "disk.raw", "2M"},
                                                                       {"convert", "-n", "a.qcow2", "disk.raw"}}) {
        const auto warned = tool(arguments);
        EXPECT_EQ(warned.status, 0) << warned.text();
        const std::string option = arguments[0] == "convert" ? "--target-format" : "--format";
        EXPECT_THAT(warned.err,
                    AllOf(HasSubstr("warning: disk.raw"), HasSubstr("guessed"), HasSubstr(option + " raw")));
        auto said = arguments;
        said.insert(said.begin() + 1, {option, "raw"});
        EXPECT_EQ(tool(said).err, "");
    }
    must_tool({"zero", "a.qcow2", "0", "512"});
}

TEST_F(WordsTest, ANameThatSaysAnotherFormat) {
    const auto warns = [&](const Arguments& arguments, const std::string& remedy) {
        const auto made = tool(arguments);
        EXPECT_EQ(made.status, 0) << made.text();
        EXPECT_THAT(made.err, remedy.empty() ? testing::Matcher<std::string>("")
                                             : AllOf(HasSubstr("although its name says"), HasSubstr(remedy)));
    };
    warns({"convert", "disk.raw", "new.qcow2"}, "use -O qcow2");
    warns({"convert", "-O", "raw", "disk.raw", "new.QCOW2"}, "use -O qcow2");
    warns({"convert", "disk.raw", "new.qcow"}, "use -O qcow2");
    warns({"convert", "disk.raw", "new.vmdk"}, "qemu-img convert");
    warns({"convert", "-O", "qcow2", "disk.raw", "new.vhdx"}, "qemu-img convert");
    warns({"convert", "-O", "qcow2", "disk.raw", "new.raw"}, "use -O raw");
    warns({"create", "-f", "raw", "other.qcow2", "1M"}, "use -f qcow2");
    warns({"create", "other.raw", "1M"}, "use -f raw");
    warns({"convert", "-O", "qcow2", "disk.raw", "sound.qcow2"}, "");
    warns({"convert", "disk.raw", "sound.raw"}, "");
    warns({"convert", "disk.raw", "sound.img"}, "");
    warns({"create", "sound.img", "1M"}, "");
    warns({"create", "sound", "1M"}, "");
}

}  // namespace
}  // namespace qcow::test
