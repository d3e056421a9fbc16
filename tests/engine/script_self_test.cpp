// The random scripts, on a disk without structure, and on one that forgets something.

#include <gtest/gtest.h>

#include "base/buffers.h"
#include "engine/script.h"
#include "storage/pass_through.h"
#include "support/effort.h"
#include "support/memory_files.h"

namespace qcow::test {
namespace {

/// A Storage that gets the last byte of every fourth write wrong.
class Forgetful final : public PassThrough {
public:
    using PassThrough::PassThrough;

    Result<void> write(HostOffset at, ConstBuffers from) override {
        if (++writes_ % 4 != 0) return inner().write(at, from);
        auto wrong = gathered(from);
        wrong.back() ^= std::byte{1};
        return inner().write(at, wrong);
    }

private:
    unsigned writes_ = 0;
};

void run_raw(const std::shared_ptr<Storage>& storage, unsigned index) {
    constexpr std::uint64_t size = 1'000'000 / 512 * 512;
    value_of(storage->resize(size));
    const auto open = [&] { return value_of(open_image(storage, {.writable = true, .format = Format::raw})); };
    Script script({open}, Bytes(size), Random::named(fmt::format("raw/{}", index)));
    script.run(60);
    EXPECT_EQ(contents_of(*storage), script.contents());
}

TEST(ScriptSelfTest, RawDisksDoWhatAnArrayDoes) {
    for (unsigned i = 0; i < 20 * effort(); ++i)
        ASSERT_NO_THROW(run_raw(memory_storage(), i)) << i << ", " << replay_hint();
}

TEST(ScriptSelfTest, OneWrongByteIsFound) {
    EXPECT_THROW(run_raw(std::make_shared<Forgetful>(memory_storage()), 0), std::runtime_error);
}

}  // namespace
}  // namespace qcow::test
