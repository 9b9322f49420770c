// Decoding against a loop over codes (`unpack` and `decode` of fqt/reference/packing.py).

#include "check.h"

namespace check {
namespace {

struct Set {
  const char* name;
  bool runs;
  decltype(&fqt::portable::decode) decode;
};
#define FQT_ROW(set, runs) {#set, bool(runs), fqt::set::decode},
const Set kSets[] = {FQT_FOR_EACH_ISA(FQT_ROW)};

void check_case(Random& r) {
  const std::string grid = r.choose<const char*>({"sign", "uint", "int", "fixed"});
  const int most = grid == "sign" ? 1 : grid == "fixed" ? 32 : 16, least = grid == "int" ? 2 : 1;
  const int bits = static_cast<int>(r.chance(0.3) ? r.between(std::min(17, most), most) : r.between(least, std::min(16, most)));
  const int storage = storage_of(bits);
  const bool sign = grid == "sign", negative = !sign && grid != "uint", doubles = bits > 24;
  const int64_t count = r.chance(0.1) ? r.between(1000, 20'000) : r.size();
  const float scale = r.factor();
  const Fenced<float> offset(std::vector<float>{r.factor()});
  const bool shifted = !doubles && r.chance(0.5);
  current.about << "decode " << count << " codes of " << grid << bits << (shifted ? " with an offset" : "");

  const int64_t low = negative ? -(int64_t{1} << (bits - 1)) : 0, high = low + (int64_t{1} << bits) - 1;
  Fenced<uint8_t> codes(bytes_of(count, storage));
  std::memset(codes.data, 0, codes.count);
  std::vector<float> expected(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = r.chance(0.1) ? r.choose({low, high}) : r.between(low, high);
    put(codes.data, i, storage, static_cast<uint32_t>(code & ((int64_t{1} << storage) - 1)));
    const int64_t number = sign ? 2 * code - 1 : code;
    expected[i] = doubles ? static_cast<float>(static_cast<double>(number) * static_cast<double>(scale))
                          : static_cast<float>(number) * scale;
    if (shifted) expected[i] = expected[i] + offset.data[0];
  }
  for (const Set& set : kSets) {
    if (!set.runs) continue;
    Fenced<float> to(count);
    set.decode({storage, sign, negative, doubles}, codes.data, count, scale, shifted ? offset.data : nullptr, to.data);
    same("decode", set.name, to.data, expected);
    ++served["decode"][set.name];
  }
}

}  // namespace

void decode(uint64_t seed, int64_t cases) { each_case(seed, cases, 3, check_case); }

}  // namespace check
