// Memory runs out in the public functions that are no methods of a disk: none of them throws.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "memory/shortage.h"
#include "qcow/compare.h"
#include "qcow/concat.h"
#include "qcow/convert.h"
#include "qcow/files_in_use.h"
#include "qcow/resize.h"
#include "qcow/serve.h"
#include "qcow/stream.h"
#include "support/qemu.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t MiB = std::uint64_t{1} << 20;

/// A value that the test makes, whatever the engine lacks.
template <class Make>
auto fed(const Make& make) {
    const Works test(false);
    return make();
}

class BoundaryTest : public testing::Test {
protected:
    void SetUp() override {
        write_file(raw_, std::string(MiB, 'x'));
        must(create({.image = {.path = base_, .options = {.size = MiB, .cluster_size = 4096}}}));
        must(create({.image = {.path = top_, .options = {.backing_name = "base", .backing_format = "qcow2"}},
                     .size_of_backing = true}));
    }

    [[nodiscard]] static ImageSpec image(const std::string& path) { return {.location = {.path = path}}; }

    TemporaryDirectory directory_;
    std::string raw_ = directory_ / "a raw file with a long name";
    std::string base_ = directory_ / "base";
    std::string top_ = directory_ / "top";
    std::string target_ = directory_ / "target";
    const std::string role_ = "a role that is long enough to be allocated";
};

TEST_F(BoundaryTest, Names) {
    for (const std::string name :
         {"a/path/that/is/long/enough/for/the/heap", "file:a/path/that/is/long/enough/for/the/heap",
          "json:{'driver':'qcow2','file':{'driver':'file','filename':'a/path/that/is/long/enough','locking':'off'}}"}) {
        expect_no_memory([&] { return parse_location(name, top_); });
        expect_no_memory([&] { return recorded_name(name); });
    }
}

TEST_F(BoundaryTest, Opening) {
    expect_no_memory([&] { return open_file(raw_); });
    const Location location{.path = raw_};
    expect_no_memory([&] { return open_storage(location, {}); });
    for (const bool untrusted : {false, true}) {
        auto spec = image(top_);
        spec.location.format = Format::qcow2;
        spec.untrusted = untrusted;
        expect_no_memory([&] { return open_image(spec); });
    }
    const auto gate = files_beneath(directory_.path());
    const FileReference reference{.name = "base", .location = {.path = base_}, .named_by = top_};
    expect_no_memory([&] { return gate(reference); });
}

TEST_F(BoundaryTest, FilesInUse) {
    using enum FilesInUse::Use;
    const auto opened = must(open_image(image(top_)));
    const auto spec = image(top_);
    expect_no_memory([&] { return FilesInUse().add(read, raw_, role_); });
    expect_no_memory([&] { return FilesInUse().add(read, *opened, role_); });
    auto replaced = spec;
    replaced.location.alone = true;
    expect_no_memory([&] { return FilesInUse().add(read, *opened, replaced, role_); });
    expect_no_memory([&] { return FilesInUse().add_unopened(read, spec, role_); });
}

TEST_F(BoundaryTest, NewFiles) {
    for (const auto& path : {target_, raw_}) {
        expect_no_memory([&]() -> Result<void> {
            FilesInUse in_use;
            auto file = NewFile::begin(path, in_use, role_);
            if (!file) return std::unexpected(std::move(file).error());
            return file->publish();
        });
    }
    EXPECT_THAT(directory_.names(), testing::Contains("target"));
    EXPECT_EQ(directory_.names().size(), 4U);
}

TEST_F(BoundaryTest, Walks) {
    const auto disk = must(open_image(image(raw_)));
    expect_no_memory([&] { return measure_usage(*disk); });
    expect_no_memory([&] {
        auto parts = fed([&] { return std::vector<std::shared_ptr<Disk>>(3, disk); });
        return concatenate(std::move(parts));
    });
    const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    expect_no_memory([&] { return copy_to_stream(*disk, {{0}, MiB}, null, role_); });
    close(null);
}

TEST_F(BoundaryTest, Jobs) {
    ConvertJob convert_job{.sources = {{image(top_)}, {image(raw_)}},
                           .target = NewImage{.path = target_, .options = {.data_file_name = "data"}}};
    convert_job.workers = 1;
    expect_no_memory([&] {
        fed([&] { return std::filesystem::remove(directory_ / "data"); });
        return convert(convert_job);
    });
    convert_job.sources.resize(1);
    convert_job.target = ConvertJob::ExistingTarget{.image = image(base_)};
    EXPECT_TRUE(fails(convert(convert_job), Errc::invalid_argument, {"would overwrite"}));
    convert_job.target = ConvertJob::ExistingTarget{.image = image(target_)};
    expect_no_memory([&] { return convert(convert_job); });

    const CreateJob create_job{
        .image = {.path = target_, .options = {.backing_name = "base", .backing_format = "qcow2"}},
        .size_of_backing = true};
    expect_no_memory([&] { return create(create_job); });
    const ResizeJob resize_job{.image = image(target_), .bytes = 2 * MiB};
    expect_no_memory([&] { return resize(resize_job); });
    const auto spec = image(top_);
    expect_no_memory([&] { return check(spec, {.workers = 1}); });
    const auto other = image(raw_);
    expect_no_memory([&] { return compare(spec, other, {.workers = 1}); });
}

TEST_F(BoundaryTest, Servers) {
    must_qemu_img({"bitmap", "--add", top_, "changes"});
    const auto disk = must(open_image(image(top_)));
    const std::vector<NbdExport> exports = {
        {.name = "an export with a long name", .disk = disk, .allocation_depth = true}};
    expect_no_memory([&] {
        auto given = fed([&] { return exports; });
        return NbdServer::make(std::move(given));
    });
    const std::string bitmap = "changes";
    expect_no_memory([&] { return dirty_bitmap_context(disk, bitmap); });
    const auto server = must(NbdServer::make(exports));
    const std::string socket = directory_ / "a socket with a long name";
    const std::string host = "localhost";
    expect_no_memory([&] { return server->listen_unix(socket); });
    expect_no_memory([&] { return server->listen_tcp(host, 0); });
}

}  // namespace
}  // namespace qcow::test
