#include "qcow/error.h"

#include <gtest/gtest.h>

#include "base/try.h"

namespace qcow {
namespace {

TEST(Error, MessageIsThePlaceAndWhatIsWrongThere) {
    EXPECT_EQ((Error{Errc::corrupt, "L1 table", "entry 3 is odd"}.message()), "L1 table: entry 3 is odd");
}

TEST(Error, MessageWithoutAPlaceHasNoColon) { EXPECT_EQ((Error{Errc::io, "", "no luck"}.message()), "no luck"); }

TEST(Error, PlacesAreNamedFromTheOutsideIn) {
    auto error = Error{Errc::corrupt, "header", "too short"}.in("overlay.qcow2");
    EXPECT_EQ(error.message(), "overlay.qcow2: header: too short");
    EXPECT_EQ(error.code, Errc::corrupt);
    EXPECT_EQ((Error{Errc::io, "", "no luck"}.in("disk").place), "disk");
}

TEST(Error, MessageIsOneLineWhateverTheImageSays) {
    // A file name that would clear the screen and forge a second line.
    const auto message = Error{Errc::corrupt, "a\nb", "\x1b[2Jfine"}.message();
    EXPECT_EQ(message, "a\\x0ab: \\x1b[2Jfine");
}

Result<int> halve(int n) {
    if (n % 2 != 0) return fail(Errc::invalid_argument, "halve", "odd");
    return n / 2;
}
Result<void> check(int n) {
    TRY(halve(n));
    return {};
}
Result<int> quarter(int n) {
    TRY_VOID(check(n));
    return TRY(halve(TRY(halve(n)))) + 0;
}

TEST(Try, GivesTheValueOrReturnsTheError) {
    EXPECT_EQ(quarter(12).value(), 3);
    ASSERT_FALSE(quarter(6));
    EXPECT_EQ(quarter(6).error().message(), "halve: odd");
    EXPECT_EQ(quarter(5).error().code, Errc::invalid_argument);
}

}  // namespace
}  // namespace qcow
