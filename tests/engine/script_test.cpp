// Random scripts on every kind of image: each step as on an array of bytes, and at the end an image that both checkers
// find sound and from which QEMU reads the same.

#include <gtest/gtest.h>

#include "engine/image_kinds.h"
#include "engine/script.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

/// At least 1,000 scripts in all. Sanitizers see the same code.
constexpr unsigned scripts_a_kind = sanitized ? 5 : 21;

class ScriptTest : public testing::TestWithParam<ImageKind> {
protected:
    static void run(const ImageKind& kind, const Prepared& prepared, unsigned index) {
        const auto files = copy_of(prepared.files);
        ScriptSubject subject;
        subject.open = [&] { return value_of(open_kind(kind, files, true)); };
        subject.can_compress = kind.can_compress();
        subject.discards_read_as_zeros = kind.discards_read_as_zeros();
        subject.may_refuse_resize = kind.snapshot;
        subject.has_snapshots = kind.has_snapshots();
        subject.has_bitmaps = kind.has_bitmaps();
        if (kind.below && !kind.snapshot && index % 2 == 0) {
            subject.commit = [&] { commit_kind(kind, files); };
            subject.has_snapshots = false;  // what they do not hold changes
        }
        Script script(subject, prepared.contents, Random::named(fmt::format("{}/{}", kind.name, index)));
        script.run(40);

        const auto image = value_of(open_kind(kind, files, false));
        const auto report = value_of(image->check({.workers = 1}));
        if (!report.clean()) {
            std::string text = fmt::format("{} leaks, {} corruptions", report.leaks, report.corruptions);
            for (const auto& finding : report.findings) text += "\n" + finding.place + ": " + finding.what;
            throw std::runtime_error(text.substr(0, 2000));
        }
        if (value_of(image->info()).dirty) throw std::runtime_error("still marked dirty");
        if (index % 10 == 0) compare_with_qemu(kind, files, script.contents());
    }

    static void compare_with_qemu(const ImageKind& kind, const Files& files, const Bytes& expected) {
        const TemporaryDirectory directory;
        save(files, directory.path());
        const auto checked = qemu_check(image_name, kind.encrypted(), directory.path());
        if (checked.status != 0) throw std::runtime_error(checked.text());
        save({{"expected", memory_storage(expected)}}, directory.path());
        const auto compared = qemu_compare_with_raw(image_name, kind.encrypted(), "expected", directory.path());
        if (compared.status != 0) throw std::runtime_error(compared.text());
        if (kind.create.data_file_raw && contents_of(*files.at("data")) != expected)
            throw std::runtime_error("the data file is not the raw image that it should be");
    }
};

TEST_P(ScriptTest, DoesWhatAnArrayDoes) {
    auto random = Random::named(GetParam().name);
    const auto prepared = prepare(GetParam(), random);
    const auto count = scripts_a_kind * effort();
    for (unsigned i = 0; i < count; ++i) {
        try {
            run(GetParam(), prepared, i);
        } catch (const std::exception& e) {
            FAIL() << "script " << i << ": " << e.what() << "\n" << replay_hint();
        }
    }
    RecordProperty("scripts", static_cast<int>(count));
    std::cout << "covered " << count << " scripts\n";
}

INSTANTIATE_TEST_SUITE_P(Kinds, ScriptTest, testing::ValuesIn(image_kinds()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace qcow::test
