// The fuzzers' inputs, without a fuzzer: whatever they once found stays found. A violation ends the process.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <vector>

#include "fuzz/image_builder.h"
#include "fuzz/inputs.h"
#include "fuzz/sparse_files.h"
#include "fuzz/write_program.h"
#include "qcow/image.h"

namespace qcow::fuzz {
namespace {

using Run = void (*)(std::span<const std::byte>);

void run_corpus(const std::string& name, Run run) {
    std::size_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(QCOW_CORPUS) / name)) {
        std::ifstream file(entry.path(), std::ios::binary);
        const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
        SCOPED_TRACE(entry.path().string());
        run(std::as_bytes(std::span(bytes)));
        ++files;
    }
    EXPECT_GT(files, 0U);
}

TEST(Corpus, Images) { run_corpus("image", run_image_input); }
TEST(Corpus, Writes) { run_corpus("write", run_write_input); }
TEST(Corpus, Headers) { run_corpus("header", run_header_input); }
TEST(Corpus, Streams) { run_corpus("codec", run_codec_input); }
TEST(Corpus, NbdClients) { run_corpus("nbd", run_nbd_input); }
TEST(Corpus, Guests) { run_corpus("guest", run_guest_input); }
TEST(Corpus, Commands) { run_corpus("control", run_control_input); }

Gate shelf_of(const std::vector<SparseFile>& files) {
    return [&files](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        if (files.size() < 2) return no_files()(reference);
        return storage_of(files[1], "second");
    };
}

TEST(ImageBuilder, BuildsImagesThatACheckFindsClean) {
    unsigned checked = 0;
    for (std::uint64_t seed = 0; seed < 400; ++seed) {
        Random random(seed);
        const auto files = build_image(random);
        OpenOptions options;
        options.gate = shelf_of(files);
        const auto image = open_image(storage_of(files.front(), "first"), options);
        // The names of other files may be such as are refused.
        if (!image) continue;
        if ((*image)->format() != Format::qcow2) continue;
        const auto report = (*image)->check({.workers = 1});
        ASSERT_TRUE(report.has_value()) << "seed " << seed << ": " << report.error().message();
        ASSERT_TRUE(report->clean()) << "seed " << seed << ": " << report->findings.front().place << ": "
                                     << report->findings.front().what;
        ++checked;
    }
    EXPECT_GT(checked, 250U);
}

TEST(WriteProgram, EncodedProgramsComeBack) {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        Random random(seed);
        auto program = build_program(random);
        for (unsigned i = 0; i < 20; ++i) change(program, random);
        const auto encoded = program.encode();
        auto rest = std::span(encoded);
        ASSERT_EQ(WriteProgram::take(rest).encode(), encoded);
        ASSERT_TRUE(rest.empty());
    }
}

TEST(ImageBuilder, EncodedFilesComeBack) {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        Random random(seed);
        const auto files = build_image(random);
        const auto again = parse_files(encode_files(files));
        ASSERT_EQ(again.size(), files.size());
        for (std::size_t i = 0; i < files.size(); ++i) {
            ASSERT_EQ(again[i].size(), files[i].size());
            for (const auto& segment : files[i].segments) {
                std::vector<std::byte> bytes(segment.bytes.size());
                again[i].read(segment.offset, bytes);
                std::vector<std::byte> expected(segment.bytes.size());
                files[i].read(segment.offset, expected);
                ASSERT_EQ(bytes, expected);
            }
        }
    }
}

}  // namespace
}  // namespace qcow::fuzz
