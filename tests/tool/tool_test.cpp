// The command line as its users meet it: output, messages, exit statuses, files made and files left alone.

#include "tool/tool_fixture.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/endian.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

TEST_F(ToolTest, InfoAsText) {
    const auto info = must_tool({"info", "top.qcow2"});
    EXPECT_THAT(info.out, AllOf(HasSubstr("qcow2, version 3"), HasSubstr("4 MiB"), HasSubstr("base.qcow2")));
    EXPECT_EQ(info.out.find('\x1b'), std::string::npos) << "colours although it is no terminal";
}

TEST_F(ToolTest, InfoAsJson) {
    const auto info = json::parse(must_tool({"info", "--json", "base.qcow2"}).out);
    EXPECT_EQ(info["format"], "qcow2");
    EXPECT_EQ(info["virtual-size"], 4 << 20);
    EXPECT_EQ(info["cluster-size"], 65536);
    ASSERT_EQ(info["snapshots"].size(), 1);
    EXPECT_EQ(info["snapshots"][0]["name"], "before");
    EXPECT_FALSE(info.contains("backing-filename"));
}

TEST_F(ToolTest, InfoOfTheChain) {
    const auto info = json::parse(must_tool({"info", "--json", "--backing-chain", "top.qcow2"}).out);
    ASSERT_EQ(info.size(), 2);
    EXPECT_EQ(info[0]["backing-filename"], "base.qcow2");
    EXPECT_EQ(info[0]["backing-filename-format"], "qcow2");
    EXPECT_EQ(info[1]["filename"], "base.qcow2");
}

TEST_F(ToolTest, InfoOfUsage) {
    const auto info = json::parse(must_tool({"info", "--json", "--usage", "top.qcow2"}).out);
    const auto& layers = info["usage"]["layers"];
    ASSERT_EQ(layers.size(), 2);
    EXPECT_EQ(layers[0]["data"]["bytes"], 65536);
    EXPECT_EQ(layers[1]["compressed"]["bytes"], 65536);
    EXPECT_THAT(must_tool({"info", "--usage", "top.qcow2"}).out, HasSubstr("LAYER"));
}

TEST_F(ToolTest, InfoOfRaw) {
    put_file(directory_.file("disk.raw"), std::string(1000, 'x'));
    const auto info = json::parse(must_tool({"info", "--json", "disk.raw"}).out);
    EXPECT_EQ(info["format"], "raw");
    EXPECT_EQ(info["virtual-size"], 1000);
}

TEST_F(ToolTest, JsonIsPrintable) {
    // DEL, a control sequence in C1, an override of the direction, and what is not UTF-8.
    const std::string name =
        "x\xc2\x9b"
        "2Jy\x7f\u202e\xff";
    must_qemu_img({"snapshot", "-c", name, "base.qcow2"}, directory_.path());
    for (const auto& command : {Arguments{"info", "--json"}, Arguments{"snapshot", "--list", "--json"}}) {
        auto arguments = command;
        arguments.push_back("base.qcow2");
        const auto out = must_tool(arguments).out;
        EXPECT_TRUE(std::ranges::all_of(out, [](char c) { return (c >= 0x20 && c <= 0x7e) || c == '\n'; })) << out;
        EXPECT_THAT(out, HasSubstr(R"("x\u009b2Jy\u007f\u202e\ufffd")"));
    }
}

TEST_F(ToolTest, PathsAreMadePrintable) {
    const auto said = must_tool({"create", "new\x1b[2J.qcow2", "1M"}).out;
    EXPECT_THAT(said, StartsWith(R"(new\x1b[2J.qcow2: qcow2, 1 MiB)"));
}

TEST_F(ToolTest, InfoWithHostileNames) {
    must_qemu_img(
        {"create", "-q", "-u", "-f", "qcow2", "-b", "evil\x1b[31m\xff\nname", "-F", "qcow2", "evil.qcow2", "1M"},
        directory_.path());
    const auto text = must_tool({"info", "evil.qcow2"});
    EXPECT_EQ(text.out.find('\x1b'), std::string::npos);
    EXPECT_EQ(text.out.find('\xff'), std::string::npos);
    EXPECT_TRUE(json::accept(must_tool({"info", "--json", "evil.qcow2"}).out));
    const auto refused = tool({"convert", "evil.qcow2", "out.raw"});
    EXPECT_EQ(refused.status, 1);
    EXPECT_EQ(refused.err.find('\x1b'), std::string::npos);
    EXPECT_EQ(std::ranges::count(refused.err, '\n'), 1) << refused.err;
}

TEST_F(ToolTest, Map) {
    const auto map = json::parse(must_tool({"map", "--json", "top.qcow2"}).out);
    std::uint64_t next = 0;
    for (const auto& extent : map) {
        EXPECT_EQ(extent["start"], next);
        next += extent["length"].get<std::uint64_t>();
    }
    EXPECT_EQ(next, 4U << 20);
    EXPECT_EQ(map[0]["depth"], 1);
    EXPECT_EQ(map[0]["data"], true);
    EXPECT_THAT(must_tool({"map", "top.qcow2"}).out, AllOf(HasSubstr("compressed"), HasSubstr("unallocated")));
}

TEST_F(ToolTest, MapOfASnapshot) {
    const auto now = must_tool({"map", "--json", "base.qcow2"}).out;
    const auto then = must_tool({"map", "--json", "-l", "before", "base.qcow2"}).out;
    EXPECT_TRUE(json::accept(then));
    EXPECT_NE(now, then);
}

TEST_F(ToolTest, MapOfAnEmptyDiskIsStillJson) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "empty.qcow2", "0"}, directory_.path());
    EXPECT_EQ(json::parse(must_tool({"map", "--json", "empty.qcow2"}).out), json::array());
}

TEST_F(ToolTest, CheckOfASoundImage) {
    EXPECT_THAT(must_tool({"check", "base.qcow2"}).out, HasSubstr("clean"));
    const auto report = json::parse(must_tool({"check", "--json", "base.qcow2"}).out);
    EXPECT_EQ(report["corruptions"], 0);
    EXPECT_EQ(report["leaks"], 0);
    EXPECT_EQ(report["check-errors"], 0);
    EXPECT_EQ(report["compressed-clusters"], 1);
    EXPECT_EQ(report["findings"], json::array());
}

TEST_F(ToolTest, CheckOfLeaksGives3) {
    // Written without its refcounts being given back: a writer that dies between two steps.
    must_qemu_img({"snapshot", "-d", "before", "base.qcow2"}, directory_.path());
    auto bytes = bytes_of("base.qcow2");
    bytes[68] = bytes[69] = bytes[70] = bytes[71] = 0;
    const auto end = bytes.size() / 65536;
    bytes.resize((end + 1) * 65536);
    bytes[2 * 65536 + 2 * end + 1] = 1;  // refcount 1 for a cluster that nobody has
    put_file(directory_.file("leak.qcow2"), bytes);
    const auto peer = qemu_img({"check", "leak.qcow2"}, directory_.path());
    ASSERT_EQ(peer.status, 3) << "the test does not make leaks: " << peer.text();
    const auto text = tool({"check", "leak.qcow2"});
    EXPECT_EQ(text.status, 3) << text.text();
    EXPECT_EQ(text.err, "");
    EXPECT_THAT(text.out, HasSubstr("leak"));
    const auto as_json = tool({"check", "--json", "leak.qcow2"});
    EXPECT_EQ(as_json.status, 3);
    EXPECT_GT(json::parse(as_json.out)["leaks"], 0);
    const auto finding = json::parse(as_json.out)["findings"].back();
    EXPECT_EQ(finding["kind"], "leak");
    EXPECT_EQ(finding["cluster"], end * 65536);
    EXPECT_EQ(finding["remedy"], "rebuild-refcounts");
}

TEST_F(ToolTest, CheckOfCorruptionGives2) {
    corrupt_l2_entry();
    const auto text = tool({"check", "base.qcow2"});
    EXPECT_EQ(text.status, 2) << text.text();
    EXPECT_THAT(text.out, HasSubstr("corruption"));
    const auto as_json = tool({"check", "--json", "base.qcow2"});
    EXPECT_EQ(as_json.status, 2);
    const auto report = json::parse(as_json.out);
    EXPECT_GT(report["corruptions"], 0);
    EXPECT_GT(report["findings"].size(), 0);
}

/// What a program needs in order to mend an image, without a look at the texts.
TEST_F(ToolTest, CheckAsJsonTellsKindClusterAndRemedy) {
    corrupt_l2_entry();
    auto bytes = bytes_of("base.qcow2");
    const auto end = bytes.size() / 65536;
    bytes.resize((end + 1) * 65536);
    bytes[2 * 65536 + 2 * end + 1] = 1;  // refcount 1 for a cluster that nobody has
    put_file(directory_.file("base.qcow2"), bytes);
    const auto findings = json::parse(tool({"check", "--json", "base.qcow2"}).out)["findings"];
    const auto with_kind = [&](std::string_view kind) {
        const auto found = std::ranges::find_if(findings, [&](const json& finding) { return finding["kind"] == kind; });
        return found == findings.end() ? json() : *found;
    };
    const auto entry = with_kind("misaligned");
    ASSERT_TRUE(entry.is_object()) << findings;
    EXPECT_EQ(entry["severity"], "corruption");
    EXPECT_EQ(entry["remedy"], "drop-entry");
    EXPECT_EQ(entry["cluster"].get<std::uint64_t>() % 65536, 0);
    const auto place = entry["place"].get<std::string>();
    EXPECT_THAT(place, HasSubstr("L2 entry at host offset"));
    // What the entry led to may have this cluster: nobody can tell.
    const auto rest = with_kind("uncounted");
    ASSERT_TRUE(rest.is_object()) << findings;
    EXPECT_EQ(rest["remedy"], "nothing");

    std::filesystem::remove(directory_.file("base.qcow2"));
    const auto chain = json::parse(tool({"check", "--json", "top.qcow2"}).out)["findings"][0];
    EXPECT_EQ(chain["kind"], "backing-chain");
    EXPECT_FALSE(chain.contains("cluster"));
}

TEST_F(ToolTest, CheckThatCannotBeDoneGives1Or63) {
    put_file(directory_.file("disk.raw"), "raw");
    const auto raw = tool({"check", "disk.raw"});
    EXPECT_EQ(raw.status, 63) << raw.text();
    EXPECT_THAT(raw.err, HasSubstr("disk.raw"));
    expect_refusal({"check", "--json", "absent.qcow2"}, HasSubstr("absent.qcow2"));
    expect_refusal({"check", "--memory", "1", "base.qcow2"}, HasSubstr("memory"));
}

TEST_F(ToolTest, CheckOfABrokenChainStillChecksTheImage) {
    std::filesystem::remove(directory_.file("base.qcow2"));
    const auto checked = tool({"check", "--json", "top.qcow2"});
    EXPECT_EQ(checked.status, 1) << checked.text();
    const auto report = json::parse(checked.out);
    EXPECT_EQ(report["check-errors"], 1);
    EXPECT_EQ(report["corruptions"], 0);
    EXPECT_THAT(report["findings"][0]["what"].get<std::string>(), HasSubstr("base.qcow2"));
}

TEST_F(ToolTest, ReadBytes) {
    EXPECT_EQ(must_tool({"read", "top.qcow2", "0", "10"}).out, std::string(10, 'C'));
    EXPECT_EQ(must_tool({"read", "top.qcow2", "65530", "10"}).out, "CCCCCCAAAA");
    EXPECT_EQ(must_tool({"read", "-l", "before", "base.qcow2", "65530", "10"}).out, "AAAAAAAAAA");
    EXPECT_EQ(must_tool({"read", "-l", "1", "base.qcow2", "0", "3"}).out, "AAA");
    EXPECT_EQ(must_tool({"read", "top.qcow2", "0", "0"}).out, "");
    EXPECT_EQ(must_tool({"read", "top.qcow2", "4M", "0"}).out, "");
}

TEST_F(ToolTest, ReadSizesWithSuffixes) {
    for (const std::string one_mebibyte : {"1M", "1m", "1024k", "1024K", "1048576", "0x100000", "1048576b"})
        EXPECT_EQ(must_tool({"read", "top.qcow2", one_mebibyte, "4"}).out, "BBBB") << one_mebibyte;
    EXPECT_EQ(must_tool({"read", "top.qcow2", "0.5M", "1.5k"}).out, std::string(1536, '\0'));
    EXPECT_EQ(must_tool({"read", "top.qcow2", "0", "4M"}).out.size(), 4U << 20);
    for (const std::string bad :
         {"", "x", "1X", "-1", "1 M", "1MM", "0x", "1e400", "99999999999999999999", "16E", "nan", "1.5"}) {
        const auto refused = tool({"read", "top.qcow2", bad, "4"});
        EXPECT_EQ(refused.status, 1) << bad << ": " << refused.text();
        EXPECT_EQ(refused.out, "") << bad;
    }
}

TEST_F(ToolTest, ReadPastTheEnd) {
    expect_refusal({"read", "top.qcow2", "4M", "1"}, HasSubstr("past the end"));
    expect_refusal({"read", "top.qcow2", "1", "4M"}, HasSubstr("past the end"));
    expect_refusal({"read", "top.qcow2", "7E", "7E"}, HasSubstr("past the end"));
}

TEST_F(ToolTest, ReadHex) {
    const auto dump = must_tool({"read", "--hex", "top.qcow2", "0", "20"});
    EXPECT_THAT(dump.out, AllOf(HasSubstr("43 43 43"), HasSubstr("|CCCCCCCCCCCCCCCC|"), HasSubstr("00000010")));
    EXPECT_EQ(std::ranges::count(dump.out, '\n'), 2);
}

TEST_F(ToolTest, ReadToAClosedPipeOrAFullDisk) {
    const auto full =
        run({"sh", "-c", std::string(QCOW_TOOL) + " read base.qcow2 0 4M > /dev/full"}, directory_.path());
    EXPECT_EQ(full.status, 1) << full.text();
    EXPECT_THAT(full.err, HasSubstr("standard output"));
}

TEST_F(ToolTest, Snapshots) {
    EXPECT_THAT(must_tool({"snapshot", "--list", "base.qcow2"}).out, HasSubstr("before"));
    const auto list = json::parse(must_tool({"snapshot", "-l", "--json", "base.qcow2"}).out);
    ASSERT_EQ(list.size(), 1);
    EXPECT_EQ(list[0]["name"], "before");
    EXPECT_EQ(list[0]["virtual-size"], 4 << 20);
    EXPECT_EQ(json::parse(must_tool({"snapshot", "-l", "--json", "top.qcow2"}).out), json::array());
    expect_refusal({"read", "-l", "no such", "base.qcow2", "0", "1"},
                   AllOf(HasSubstr("no such"), HasSubstr("base.qcow2")));
}

TEST_F(ToolTest, Convert) {
    for (const std::string name : {"base.qcow2", "top.qcow2"}) {
        must_tool({"convert", name, "ours.raw"});
        qemu_convert_to_raw(name, "qcow2", "theirs.raw", {}, directory_.path());
        EXPECT_EQ(bytes_of("ours.raw"), bytes_of("theirs.raw")) << name;
    }
    must_tool({"convert", "-l", "before", "base.qcow2", "ours.raw"});
    qemu_convert_to_raw("base.qcow2", "qcow2", "theirs.raw", "before", directory_.path());
    EXPECT_EQ(bytes_of("ours.raw"), bytes_of("theirs.raw"));
    EXPECT_EQ(files(), (std::set<std::string>{"base.qcow2", "top.qcow2", "ours.raw", "theirs.raw"}));
}

TEST_F(ToolTest, ConvertSavesTheDiskOfAnImageWhoseSnapshotsAreLost) {
    qemu_convert_to_raw("base.qcow2", "qcow2", "expected.raw", {}, directory_.path());
    auto bytes = bytes_of("base.qcow2");
    const auto table = load_be<std::uint64_t>(std::as_bytes(std::span(bytes)), 64);
    bytes.replace(table + 36, 4, 4, '\xff');  // the length of the first entry's extra data
    put_file(directory_.file("base.qcow2"), bytes);
    EXPECT_THAT(tool({"info", "base.qcow2"}).err, HasSubstr("snapshot table"));
    must_tool({"convert", "base.qcow2", "saved.raw"});
    EXPECT_TRUE(bytes_of("saved.raw") == bytes_of("expected.raw"));
    must_tool({"convert", "-O", "qcow2", "base.qcow2", "saved.qcow2"});
    must_qemu_img({"compare", "-f", "qcow2", "-F", "raw", "saved.qcow2", "expected.raw"}, directory_.path());
}

TEST_F(ToolTest, ConvertPutsSourcesOneBehindTheOther) {
    put_file(directory_ / "odd.raw", std::string(100'001, 'o'));
    put_file(directory_ / "even.raw", std::string(65'536, 'e'));
    const auto expect_as_qemu = [&](const Arguments& sources) {
        Arguments ours = {"convert"};
        Arguments theirs = {"convert", "-O", "raw"};
        ours.insert(ours.end(), sources.begin(), sources.end());
        theirs.insert(theirs.end(), sources.begin(), sources.end());
        ours.emplace_back("ours.raw");
        theirs.emplace_back("theirs.raw");
        EXPECT_EQ(tool(ours).status, 0);
        must_qemu_img(theirs, directory_.path());
        EXPECT_FALSE(
            first_difference(ReferenceFile(directory_ / "ours.raw"), ReferenceFile(directory_ / "theirs.raw")));
    };
    expect_as_qemu({"top.qcow2", "base.qcow2"});
    expect_as_qemu({"-f", "raw", "odd.raw", "even.raw", "odd.raw"});
    expect_as_qemu({"base.qcow2", "base.qcow2", "top.qcow2"});

    must_tool({"convert", "-O", "qcow2", "-c", "-f", "raw", "odd.raw", "even.raw", "odd.raw", "ours.qcow2"});
    must_qemu_img({"convert", "-f", "raw", "-O", "raw", "odd.raw", "even.raw", "odd.raw", "theirs.raw"},
                  directory_.path());
    must_qemu_img({"compare", "ours.qcow2", "theirs.raw"}, directory_.path());
}

TEST_F(ToolTest, ConvertOfSeveralSourcesRefuses) {
    expect_refusal({"convert", "base.qcow2", "absent.qcow2", "x.raw"}, HasSubstr("absent.qcow2"));
    expect_refusal({"convert", "base.qcow2", "top.qcow2", "base.qcow2"}, HasSubstr("overwrite source 1"));
    expect_refusal({"convert", "-l", "before", "base.qcow2", "top.qcow2", "x.raw"}, HasSubstr("single source"));
    expect_refusal({"convert", "base.qcow2"}, HasSubstr("TARGET"));
}

TEST_F(ToolTest, ConvertMakesHolesOfZeros) {
    must_tool({"convert", "top.qcow2", "sparse.raw"});
    const auto sparse = json::parse(must_tool({"info", "--json", "sparse.raw"}).out);
    EXPECT_LT(sparse["actual-size"], 1 << 20);
    must_tool({"convert", "-S", "0", "base.qcow2", "other.raw"});
    EXPECT_EQ(bytes_of("other.raw").size(), 4U << 20);
}

TEST_F(ToolTest, ConvertReplacesAFileAndKeepsItsPermissions) {
    put_file(directory_.file("out.raw"), "old contents");
    std::filesystem::permissions(directory_.file("out.raw"), std::filesystem::perms(0640));
    must_tool({"convert", "base.qcow2", "out.raw"});
    EXPECT_EQ(bytes_of("out.raw").size(), 4U << 20);
    EXPECT_EQ(std::filesystem::status(directory_.file("out.raw")).permissions(), std::filesystem::perms(0640));
}

TEST_F(ToolTest, ConvertFollowsASymbolicLink) {
    put_file(directory_.file("real.raw"), "old contents");
    std::filesystem::create_symlink("real.raw", directory_.file("link.raw"));
    must_tool({"convert", "base.qcow2", "link.raw"});
    EXPECT_TRUE(std::filesystem::is_symlink(directory_.file("link.raw")));
    EXPECT_EQ(bytes_of("real.raw").size(), 4U << 20);
}

TEST_F(ToolTest, ConvertThatFailsLeavesNothingBehind) {
    corrupt_l2_entry();
    const auto before = files();
    const auto source = bytes_of("base.qcow2");
    expect_refusal({"convert", "base.qcow2", "out.raw"}, AllOf(HasSubstr("base.qcow2"), HasSubstr("L2 entry")));
    EXPECT_EQ(files(), before);
    put_file(directory_.file("out.raw"), "old contents");
    expect_refusal({"convert", "base.qcow2", "out.raw"}, HasSubstr("L2 entry"));
    EXPECT_EQ(bytes_of("out.raw"), "old contents");
    EXPECT_EQ(bytes_of("base.qcow2"), source) << "the source was changed";
}

TEST_F(ToolTest, ConvertThatRunsOutOfSpaceLeavesNothingBehind) {
    const auto before = files();
    // A limit on the size of files instead of a full disk.
    const auto finished =
        run({"sh", "-c", "trap '' XFSZ; ulimit -f 100; exec " + std::string(QCOW_TOOL) + " convert base.qcow2 out.raw"},
            directory_.path());
    EXPECT_EQ(finished.status, 1) << finished.text();
    EXPECT_THAT(finished.err, AllOf(StartsWith("qcow: "), HasSubstr("out.raw")));
    EXPECT_EQ(files(), before);
}

TEST_F(ToolTest, ConvertOntoItselfIsRefused) {
    const auto source = bytes_of("base.qcow2");
    expect_refusal({"convert", "base.qcow2", "base.qcow2"}, HasSubstr("base.qcow2"));
    expect_refusal({"convert", "base.qcow2", "./base.qcow2"}, HasSubstr("base.qcow2"));
    std::filesystem::create_hard_link(directory_.file("base.qcow2"), directory_.file("hard"));
    expect_refusal({"convert", "base.qcow2", "hard"}, HasSubstr("hard"));
    std::filesystem::create_symlink("base.qcow2", directory_.file("soft"));
    expect_refusal({"convert", "base.qcow2", "soft"}, HasSubstr("soft"));
    EXPECT_EQ(bytes_of("base.qcow2"), source);
}

TEST_F(ToolTest, ConvertOntoItsBackingFileIsRefused) {
    const auto backing = bytes_of("base.qcow2");
    expect_refusal({"convert", "top.qcow2", "base.qcow2"}, HasSubstr("base.qcow2"));
    EXPECT_EQ(bytes_of("base.qcow2"), backing);
}

TEST_F(ToolTest, ConvertOntoASourceIsRefusedAlsoWithoutLocks) {
    const auto source = bytes_of("base.qcow2");
    for (const std::string from : {"top.qcow2", "base.qcow2"}) {
        const auto finished = tool({"convert", "-U", from, "base.qcow2"});
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_TRUE(bytes_of("base.qcow2") == source) << "what was being read was replaced";
        put_file(directory_.file("base.qcow2"), source);
    }
}

TEST_F(ToolTest, ConvertIntoNowhere) {
    expect_refusal({"convert", "base.qcow2", "no/such/directory/out.raw"}, HasSubstr("no/such/directory"));
    expect_refusal({"convert", "base.qcow2", "."}, HasSubstr("directory"));
}

TEST_F(ToolTest, MissingBackingFile) {
    std::filesystem::remove(directory_.file("base.qcow2"));
    EXPECT_THAT(must_tool({"info", "top.qcow2"}).out, HasSubstr("base.qcow2"));
    const auto message = AllOf(HasSubstr("top.qcow2"), HasSubstr("base.qcow2"), HasSubstr("No such file"));
    expect_refusal({"convert", "top.qcow2", "out.raw"}, message);
    expect_refusal({"map", "top.qcow2"}, message);
    expect_refusal({"read", "top.qcow2", "0", "1"}, message);
    EXPECT_EQ(files(), std::set<std::string>{"top.qcow2"});
    const auto chain = tool({"info", "--backing-chain", "--json", "top.qcow2"});
    EXPECT_EQ(chain.status, 1) << chain.text();
    EXPECT_EQ(json::parse(chain.out).size(), 1) << chain.text();
    EXPECT_THAT(chain.err, message);
}

TEST_F(ToolTest, ForceShare) {
    const auto writer = value_of(open_file(directory_.file("base.qcow2"), {.writable = true}));
    expect_refusal({"convert", "base.qcow2", "out.raw"}, AllOf(HasSubstr("base.qcow2"), HasSubstr("-U")));
    must_tool({"convert", "-U", "base.qcow2", "out.raw"});
    must_tool({"info", "--force-share", "base.qcow2"});
    must_tool({"read", "-U", "top.qcow2", "0", "1"});
}

TEST_F(ToolTest, GuessedFormatIsWarnedOfOnStandardError) {
    // Version 1 cannot record it.
    must_qemu_img({"create", "-q", "-f", "qcow", "-b", "base.qcow2", "-F", "qcow2", "old.qcow"}, directory_.path());
    const auto map = tool({"map", "--json", "old.qcow"});
    EXPECT_EQ(map.status, 0) << map.text();
    EXPECT_TRUE(json::accept(map.out));
    EXPECT_THAT(map.err, AllOf(HasSubstr("warning"), HasSubstr("base.qcow2")));
}

TEST_F(ToolTest, FormatCanBeForced) {
    EXPECT_EQ(json::parse(must_tool({"info", "-f", "raw", "--json", "base.qcow2"}).out)["format"], "raw");
    put_file(directory_.file("disk.raw"), std::string(4096, 'x'));
    expect_refusal({"info", "-f", "qcow2", "disk.raw"}, HasSubstr("not a qcow2 image"));
    expect_refusal({"info", "-f", "vmdk", "base.qcow2"}, HasSubstr("vmdk"));
}

TEST_F(ToolTest, Progress) {
    EXPECT_EQ(tool({"convert", "base.qcow2", "out.raw"}).err, "");
    const auto shown = tool({"convert", "-p", "base.qcow2", "out.raw"});
    EXPECT_EQ(shown.status, 0);
    EXPECT_EQ(shown.out, "");
    EXPECT_THAT(shown.err, HasSubstr("100%"));
    const auto checked = tool({"check", "-p", "--json", "base.qcow2"});
    EXPECT_TRUE(json::accept(checked.out));
}

TEST_F(ToolTest, Help) {
    EXPECT_THAT(must_tool({"--help"}).out, AllOf(HasSubstr("convert"), HasSubstr("Exit status")));
    for (const std::string command : {"info", "map", "check", "compare", "digest", "convert", "create", "read", "write",
                                      "zero", "discard", "resize", "snapshot"}) {
        const auto help = must_tool({command, "--help"});
        EXPECT_THAT(help.out, AllOf(HasSubstr("Usage: qcow " + command), HasSubstr("Example"))) << command;
        EXPECT_EQ(must_tool({command, "-h"}).out, help.out);
    }
    EXPECT_THAT(must_tool({"--version"}).out, StartsWith("qcow "));
}

TEST_F(ToolTest, WrongUsage) {
    expect_refusal({}, HasSubstr("--help"));
    expect_refusal({"frobnicate"}, HasSubstr("frobnicate"));
    expect_refusal({"info"}, HasSubstr("IMAGE"));
    expect_refusal({"info", "--no-such-option", "base.qcow2"}, HasSubstr("--no-such-option"));
    expect_refusal({"info", "base.qcow2", "top.qcow2"}, HasSubstr("top.qcow2"));
    expect_refusal({"convert", "base.qcow2"}, HasSubstr("TARGET"));
    expect_refusal({"convert", "-O", "vmdk", "base.qcow2", "out"}, HasSubstr("vmdk"));
    expect_refusal({"convert", "-m", "0", "base.qcow2", "out"}, HasSubstr("workers"));
    expect_refusal({"read", "base.qcow2", "0"}, HasSubstr("LENGTH"));
    EXPECT_EQ(files(), (std::set<std::string>{"base.qcow2", "top.qcow2"}));
}

TEST_F(ToolTest, WhatIsNoImage) {
    expect_refusal({"info", "."}, HasSubstr("directory"));
    expect_refusal({"info", "absent.qcow2"}, AllOf(HasSubstr("absent.qcow2"), HasSubstr("No such file")));
    expect_refusal({"info", "/dev/null"}, HasSubstr("/dev/null"));
    must_run({"mkfifo", "pipe"}, directory_.path());
    expect_refusal({"info", "pipe"}, HasSubstr("pipe"));
    put_file(directory_.file("empty"), "");
    must_tool({"info", "empty"});
    expect_refusal({"info", "-f", "qcow2", "empty"}, HasSubstr("empty"));
}

}  // namespace
}  // namespace qcow::test
