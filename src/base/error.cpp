#include "qcow/error.h"

#include "qcow/text.h"

namespace qcow {

std::string Error::message() const { return printable(place.empty() ? what : place + ": " + what); }

Error Error::in(std::string_view outer) && {
    place = place.empty() ? std::string(outer) : std::string(outer) + ": " + place;
    return std::move(*this);
}

}  // namespace qcow
