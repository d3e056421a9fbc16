// Every option of every verb of qemu-img, given to qcow: it works, or the refusal says what replaces it.

#include <regex>
#include <sstream>

#include "support/effort.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

struct VerbOptions {
    std::string verb;
    std::vector<std::string> options;  // each with its value
    std::string rest;  // of the command; IMAGE is the image, as --image-opts wants it where that is given
};

std::vector<VerbOptions> options_of_qemu_img() {
    const std::string object = "--object secret,id=s,data=x";
    return {
        {"amend",
         {object, "--image-opts", "-p", "--progress", "-q", "--quiet", "-f qcow2", "--format qcow2", "-t none",
          "--cache none", "--force"},
         "-o lazy_refcounts=on IMAGE"},
        {"amend", {"-o size=2M", "--options size=2M"}, "IMAGE"},
        {"bitmap",
         {"--merge there", "--clear", "--enable", "--disable", "--remove", "--clear " + object, "--clear --image-opts",
          "--clear -f qcow2", "--clear --format qcow2", "--clear -q", "--clear --quiet"},
         "IMAGE there"},
        {"bitmap",
         {"-g 4k --add", "--granularity 4k --add", "-b other.qcow2 -F qcow2 --add --merge there",
          "--source-file other.qcow2 --source-format qcow2 --add --merge there"},
         "IMAGE new"},
        {"check",
         {object, "--image-opts", "-q", "--quiet", "-f qcow2", "--format qcow2", "--output=json", "--output human",
          "-r leaks", "-r all", "--repair=all", "-T none", "--cache none", "-U", "--force-share"},
         "IMAGE"},
        {"commit",
         {object, "--image-opts", "-q", "--quiet", "-f qcow2", "--format qcow2", "-t none", "--cache none",
          "-b base.qcow2", "--base base.qcow2", "-r 1M", "--rate 1M", "-d", "--drop", "-p", "--progress"},
         "IMAGE"},
        {"compare",
         {object, "-f qcow2", "--a-format qcow2", "-F qcow2", "--b-format qcow2", "-T none", "--cache none", "-p",
          "--progress", "-q", "--quiet", "-s", "--strict", "-U", "--force-share"},
         "IMAGE copy.qcow2"},
        {"compare", {"--image-opts"}, "IMAGE IMAGE"},
        {"convert",
         {object,
          "--image-opts",
          "--source-image-opts",
          "--target-image-opts",
          "--bitmaps",
          "--bitmaps --skip-broken-bitmaps",
          "-U",
          "--force-share",
          "-C",
          "--copy-range-offloading",
          "-c",
          "--compress",
          "-p",
          "--progress",
          "-q",
          "--quiet",
          "-f qcow2",
          "--source-format qcow2",
          "-t unsafe",
          "--target-cache unsafe",
          "-T none",
          "--source-cache none",
          "-o cluster_size=4k",
          "--target-options cluster_size=4k",
          "-B base.qcow2 -F qcow2",
          "-l saved",
          "-l snapshot.name=saved",
          "--source-snapshot saved",
          "-S 64k",
          "--sparse-size 64k",
          "-r 1M",
          "--rate 1M",
          "-m 4",
          "--parallel 4",
          "-W",
          "--oob-writes",
          "--salvage"},
         "-O qcow2 IMAGE new.qcow2"},
        {"convert", {"-O raw", "--target-format raw"}, "IMAGE new.raw"},
        {"convert", {"-n", "--no-create", "-n --target-is-zero"}, "IMAGE empty.qcow2"},
        {"create",
         {object, "-q", "--quiet", "-f qcow2", "--format qcow2", "-o cluster_size=4k", "--options cluster_size=4k"},
         "new.qcow2 1M"},
        {"create",
         {"-b base.qcow2 -F qcow2", "--backing base.qcow2 --backing-format qcow2", "-u -b nowhere -F qcow2",
          "--backing-unsafe -b nowhere -F qcow2"},
         "new.qcow2 1M"},
        {"info",
         {object, "--image-opts", "-f qcow2", "--format qcow2", "--output=json", "--output human", "--backing-chain",
          "-b", "-U", "--force-share"},
         "IMAGE"},
        {"map",
         {object, "--image-opts", "-f qcow2", "--format qcow2", "--start-offset=64k", "--max-length=64k",
          "--output=json", "--output human", "-U", "--force-share"},
         "IMAGE"},
        {"measure",
         {object, "--image-opts", "-f qcow2", "--format qcow2", "-l saved", "--snapshot saved", "-o cluster_size=4k",
          "--target-options cluster_size=4k", "--output=json", "--output human", "-U", "--force-share"},
         "-O qcow2 IMAGE"},
        {"measure", {"--size 1M", "-s 1M"}, "-O qcow2"},
        {"measure", {"-O qcow2", "--target-format qcow2"}, "IMAGE"},
        {"rebase",
         {object,
          "--image-opts",
          "-U",
          "--force-share",
          "-q",
          "--quiet",
          "-f qcow2",
          "--format qcow2",
          "-t none",
          "--cache none",
          "-T none",
          "--backing-cache none",
          "-p",
          "--progress",
          "-u",
          "--backing-unsafe",
          "-c",
          "--compress",
          "-b base.qcow2",
          "--backing base.qcow2"},
         "-b base.qcow2 -F qcow2 IMAGE"},
        {"rebase", {"-F qcow2", "--backing-format qcow2"}, "-b base.qcow2 IMAGE"},
        {"resize",
         {object, "--image-opts", "-f qcow2", "--format qcow2", "--preallocation=off", "--preallocation metadata", "-q",
          "--quiet"},
         "IMAGE +1M"},
        {"resize", {"--shrink"}, "IMAGE 512k"},
        {"snapshot",
         {object, "--image-opts", "-U", "--force-share", "-q", "--quiet", "-l", "-f qcow2", "--format qcow2",
          "-a saved", "-c new", "-d saved"},
         "IMAGE"},
    };
}

Arguments words_of_line(const std::string& line) {
    std::istringstream words(line);
    return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
}

class QemuOptionsTest : public ToolTest {
protected:
    void SetUp() override {
        const auto qemu = [&](const std::string& line) { must_qemu_img(words_of_line(line), directory_.path()); };
        qemu("create -q -f qcow2 base.qcow2 1M");
        for (const std::string name : {"disk.qcow2", "other.qcow2"}) {
            qemu("create -q -f qcow2 -b base.qcow2 -F qcow2 " + name + " 1M");
            qemu("bitmap --add " + name + " there");
            qemu("snapshot -c saved " + name);
        }
        qemu("create -q -f qcow2 copy.qcow2 1M");
        qemu("create -q -f qcow2 empty.qcow2 1M");
        for (const auto& name : files()) images_[name] = bytes_of(name);
    }

    /// Runs the command on fresh images.
    [[nodiscard]] Finished run_line(const std::string& line) const {
        for (const auto& name : files()) std::filesystem::remove(directory_.file(name));
        for (const auto& [name, bytes] : images_) write_file(directory_.file(name), bytes);
        const bool image_opts = line.find("-image-opts") != std::string::npos && !line.contains("--target-image-opts");
        auto arguments = words_of_line(line);
        for (auto& word : arguments)
            if (word == "IMAGE") word = image_opts ? "driver=qcow2,file.filename=disk.qcow2" : "disk.qcow2";
        return tool(arguments);
    }

private:
    std::map<std::string, std::string> images_;
};

TEST_F(QemuOptionsTest, EachWorksOrIsReplaced) {
    for (const auto& [verb, options, rest] : options_of_qemu_img()) {
        for (const auto& option : fewer(options)) {
            auto line = verb;
            line.append(" ").append(option).append(" ").append(rest);
            const auto done = run_line(line);
            if (done.status == 0) continue;
            EXPECT_THAT(done.err, HasSubstr("is an option of QEMU that qcow " + verb + " does not have; ")) << line;
        }
    }
}

/// The table above has all that qemu-img's help has.
TEST_F(QemuOptionsTest, NoneIsMissing) {
    std::map<std::string, std::set<std::string>> tried;
    for (const auto& [verb, options, rest] : options_of_qemu_img()) {
        for (const auto& line : options)
            for (const auto& word : words_of_line(line)) tried[verb].insert(word.substr(0, word.find('=')));
        for (const auto& word : words_of_line(rest)) tried[verb].insert(word);
    }
    const std::regex option("[\\[ |(](--?[A-Za-z][A-Za-z-]*)");
    for (auto& [verb, known] : tried) {
        auto help = qemu_img({verb, "--help"}, directory_.path()).out;
        if (const auto all = help.find("Command syntax:"); all != std::string::npos) {  // before QEMU 10
            const auto begin = help.find("\n  " + verb + " ", all);
            help = help.substr(begin, help.find('\n', begin + 1) - begin);
        }
        known.insert({"-h", "--help", "--progres"});  // the last one is a misprint of QEMU 10
        for (std::sregex_iterator found(help.begin(), help.end(), option), end; found != end; ++found)
            EXPECT_TRUE(known.contains((*found)[1])) << verb << " " << (*found)[1];
    }
}

}  // namespace
}  // namespace qcow::test
